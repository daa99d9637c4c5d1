"""Interleaved timing, and ratios with their errors.

All contenders of a row take turns, in a new order each round, so that a slow phase of
the machine slows all of them. A ratio is the median over the rounds of the ratio
within a round. One contender takes part twice: how far its ratio to itself is from 1
is the noise of the row.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LIMIT = 0.1  # The page leaves out a row whose noise is larger.
SAMPLE_SECONDS = 0.003  # Shorter calls are timed several at once.
MOST_ROUNDS = 1001

Row = dict[str, Any]


class Absent(Exception):
    """Why a contender takes no part in a row."""


class Options(NamedTuple):
    seconds: float = 6.0  # Of timing for one row, about.
    least_rounds: int = 9


@dataclass(frozen=True)
class Contender:
    """One way to do the job; `run(n)` calls it n times and waits for the last."""

    name: str
    run: Callable[[int], Any] = field(repr=False)
    # "new": an array from the allocator; "reused": donated, or `out=`; "pooled": a new
    # array in memory that the framework keeps, as TensorFlow does.
    output: str = "new"
    direction: str = "forward"  # or "gradient"
    compared: str = "all"  # with the right answer: "all", "valid" steps, or "none"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.output, self.direction


def device() -> Any:
    """The device that is timed; the command line sets it."""
    return jnp.zeros(()).devices().pop()


def repeat(call: Callable[[], Any]) -> Callable[[int], Any]:
    """The `run` of a contender whose calls return JAX arrays."""
    # A CPU runs independent calls side by side; other devices one after the other.
    wait = jax.block_until_ready if device().platform == "cpu" else lambda out: out

    def run(n: int) -> Any:
        for _ in range(n - 1):
            wait(call())
        return jax.block_until_ready(call())

    return run


def gather(peers: dict[str, Iterator[Contender]], check: Callable[[Contender], None]):
    """The contenders that answer rightly, and why the others take no part."""
    found: list[Contender] = []
    absent: dict[str, str] = {}
    for name, contenders in peers.items():
        try:
            for contender in contenders:
                check(contender)
                found.append(contender)
        except Exception as error:  # Whatever a framework raises is said, not timed.
            absent[name] = " ".join(str(error).split())[:120]
    return found, absent


def measure(
    options: Options,
    base: Sequence[str],
    own: Sequence[Contender],
    peers: Sequence[Contender] = (),
) -> Row:
    """Times `own`, then `own` among `peers`, whose slowest would add noise to `own`.

    `base` names the contenders that times are divided by; the first takes part twice.
    """
    first = next(c for c in own if c.name == base[0])
    again = dataclasses.replace(first, name=f"{first.name}, again")
    seconds, rounds = options.seconds / (2 if peers else 1), options.least_rounds
    samples = take_turns([*own, again], seconds, rounds)
    itself = ratio(samples.pop(again.key), samples[first.key])
    noise = _round(abs(itself["ratio"] - 1) + itself["error"])
    times = summary(samples, base)
    if peers:
        samples = take_turns([*own, *peers], seconds, rounds)
        times += summary(samples, base)[len(own) :]
    return dict(noise=noise, times=times)


def take_turns(
    contenders: Sequence[Contender], seconds: float, least_rounds: int
) -> dict[tuple[str, str, str], np.ndarray]:
    """The seconds of one call of each contender, round by round."""
    calls, samples = {}, {contender.key: [] for contender in contenders}
    assert len(samples) == len(contenders), "two contenders of one name"
    for contender in contenders:
        contender.run(1)  # Compiles, and touches its memory.
        calls[contender.key] = _calls(contender)
    order, rng = list(contenders), random.Random(0)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for done in range(MOST_ROUNDS):
            if done >= least_rounds and time.perf_counter() > end:
                break
            rng.shuffle(order)
            for contender in order:
                n = calls[contender.key]
                if n > 1:
                    contender.run(1)  # Caches hold what the contender before used.
                samples[contender.key].append(_seconds(contender, n))
    finally:
        gc.enable()
    return {key: np.array(values) for key, values in samples.items()}


def _seconds(contender: Contender, n: int) -> float:
    start = time.perf_counter()
    contender.run(n)
    return (time.perf_counter() - start) / n


def _calls(contender: Contender) -> int:
    n, seconds = 1, min(_seconds(contender, 1) for _ in range(3))
    while n * seconds < SAMPLE_SECONDS:
        n = min(math.ceil(1.2 * SAMPLE_SECONDS / max(seconds, 1e-7)), 4 * n)
        seconds = min(seconds, _seconds(contender, n))
    return n


def ratio(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The median ratio, and two standard errors of that median."""
    low, median, high = np.quantile(a / b, [0.25, 0.5, 0.75])
    # The error of a median is 1.253 sigma / sqrt(n); sigma is the spread / 1.349.
    error = 2 * 1.253 / 1.349 * (high - low) / math.sqrt(len(a))
    return {"ratio": _round(median), "error": _round(error)}


def summary(samples: dict[Any, np.ndarray], base: Sequence[str]) -> list[Row]:
    """One entry for each contender, divided by the bases with the same kind of output.

    A pooled output is divided by a new one: a plain call returns either. The gradient
    is divided by the base's gradient where the base has one.
    """
    entries = []
    for (name, output, direction), values in samples.items():
        to, same = {}, "new" if output == "pooled" else output
        for other in base:
            keys = [(other, same, way) for way in (direction, "forward")]
            key = next((key for key in keys if key in samples), None)
            if key and other != name:
                to[other] = ratio(values, samples[key])
        entry = Row(name=name, output=output, direction=direction, to=to)
        entries.append(entry | {"seconds": _round(np.median(values))})
    return entries


def _round(value: Any) -> float:
    return float(f"{value:.4g}")

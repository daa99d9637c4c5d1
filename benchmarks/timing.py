"""Interleaved timing, and what it takes to say whether two times differ.

All contenders of a row take turns, in a new order each round, so that what slows the
machine slows all of them; a ratio is the median over the rounds of the ratio within a
round. `x + 1` takes part twice: how far its ratio to itself is from 1 is what the
machine let us see on that row, and past `LIMIT` the row is called noisy.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LIMIT = 0.05  # A larger error of `x + 1` against itself makes a row noisy.
SAMPLE_SECONDS = 0.003  # Calls shorter than this are timed several at once.
LEAST_ROUNDS, MOST_ROUNDS = 9, 1001


@dataclass(frozen=True)
class Contender:
    """One way to do the job. `run(n)` calls it n times and returns when all is done."""

    name: str
    run: Callable[[int], Any] = field(repr=False)
    # Its output: "reused"; "fresh", from the allocator; "eager", which is fresh without
    # jit; or "pooled", a new array in memory that the framework had kept for it.
    regime: str = "reused"
    direction: str = "forward"  # or "vjp"
    # What must be right: all, the valid part (False), nothing in a mere bound (None).
    whole: bool | None = True

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.regime, self.direction


Samples = dict[tuple[str, str, str], np.ndarray]


def take_turns(
    contenders: Sequence[Contender], seconds: float, least_rounds: int = LEAST_ROUNDS
) -> Samples:
    """The seconds that one call of each took, round by round."""
    calls, samples = {}, {contender.key: [] for contender in contenders}
    assert len(samples) == len(contenders), "two contenders of one name"
    for contender in contenders:
        contender.run(1)  # Compiles, and touches its memory.
        calls[contender.key] = _calls(contender)
    order, rng = list(contenders), random.Random(0)
    end = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(MOST_ROUNDS):
            if done >= least_rounds and time.perf_counter() > end:
                break
            rng.shuffle(order)
            for contender in order:
                n = calls[contender.key]
                if n > 1:
                    contender.run(1)  # In short calls one feels who was here before.
                samples[contender.key].append(_seconds(contender, n))
    finally:
        if collecting:
            gc.enable()
    return {key: np.array(values) for key, values in samples.items()}


def _seconds(contender: Contender, n: int) -> float:
    start = time.perf_counter()
    contender.run(n)
    return (time.perf_counter() - start) / n


def _calls(contender: Contender) -> int:
    # The least of all: by a slow first look alike contenders would get unlike numbers
    # of calls, of which the first costs most.
    n, seconds = 1, min(_seconds(contender, 1) for _ in range(3))
    while n * seconds < SAMPLE_SECONDS:  # A single short call says little by itself.
        n = min(math.ceil(1.2 * SAMPLE_SECONDS / max(seconds, 1e-7)), 4 * n)
        seconds = min(seconds, _seconds(contender, n))
    return n


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def ratio(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The median ratio, with twice the standard error of that median."""
    low, median, high = _spread(a / b)
    # The error of a median is 1.25 sigma / sqrt(n), and sigma the spread / 1.35.
    error = 2 * 1.253 / 1.349 * (high - low) / math.sqrt(len(a))
    return {"ratio": _round(median), "error": _round(error)}


def summary(
    samples: Samples, beside: Callable[[tuple[str, str, str]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry for each contender; `beside` names what it is to be divided by."""
    entries = []
    for key, values in samples.items():
        name, regime, direction = key
        low, median, high = _spread(values)
        entries.append(
            {
                **dict(name=name, regime=regime, direction=direction),
                "seconds": _round(median),
                "quartiles": [_round(low), _round(high)],
                "to": {
                    label: ratio(values, samples[other])
                    for label, other in beside(key).items()
                    if other in samples
                },
            }
        )
    return entries


def noise(a: np.ndarray, again: np.ndarray) -> dict[str, Any]:
    """What twice the same thing says of the machine; `quiet` if it is good enough."""
    own = ratio(again, a)
    resolution = abs(own["ratio"] - 1) + own["error"]
    return {
        "resolution": _round(resolution),
        "rounds": len(a),
        "quiet": bool(resolution <= LIMIT),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")

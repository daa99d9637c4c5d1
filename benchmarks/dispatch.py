"""What a call costs beside its bytes: dispatch, import, compiling, fresh memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import OURS, pasted
from benchmarks.timing import Contender, noise, summary, take_turns
from jax_revseg import reverse_segments_p, reverse_sequence
from tests.cases import Case

CALLS = 40
FLIP = "jnp.flip"
IMPORT = """
import time, jax
start = time.perf_counter()
import jax_revseg
print(time.perf_counter() - start)
"""


FRESH = """
import statistics, time, jax, jax.numpy as jnp
x = jnp.ones((64, 1024, 256))
fresh = jax.jit(lambda x: x + 1)
reused = jax.jit(lambda x, out: x + 1, donate_argnums=1, keep_unused=True)
out, ratios = reused(x, jnp.zeros_like(x)), []
for _ in range(15):
    times = [time.perf_counter()]
    fresh(x).block_until_ready()
    times.append(time.perf_counter())
    out = reused(x, out).block_until_ready()
    times.append(time.perf_counter())
    ratios.append((times[1] - times[0]) / (times[2] - times[1]))
print(statistics.median(ratios))
"""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def measure(options: Any) -> dict[str, Any]:
    """Small arrays, so that the call is all that there is to time."""
    with jax.default_device(options.device):
        x, lengths = jnp.ones((4, 16, 8)), jnp.array([3, 0, 16, 7])

        def flip(x: jax.Array, lengths: jax.Array) -> jax.Array:
            return jnp.flip(x, 1)

        host = np.asarray(lengths)

        def on_host(x: jax.Array, lengths: jax.Array) -> jax.Array:
            return reverse_sequence(x, host)

        def bind(x: jax.Array, lengths: jax.Array) -> jax.Array:
            return reverse_segments_p.bind(
                x, lengths, axis=1, batch_axes=(0,), layout="padded"
            )

        def contender(name: str, function: Any, regime: str) -> Contender:
            def run(n: int) -> jax.Array:
                for _ in range(n - 1):
                    function(x, lengths)
                return function(x, lengths).block_until_ready()

            return Contender(name, run, regime)

        samples = take_turns(
            [
                contender(FLIP, flip, "eager"),
                contender(OURS, reverse_sequence, "eager"),
                contender(f"{OURS}, NumPy lengths", on_host, "eager"),
                contender("the bind alone", bind, "eager"),
                contender(FLIP, jax.jit(flip), "jitted"),
                contender(FLIP + ", again", jax.jit(flip), "jitted"),
                contender(OURS, jax.jit(reverse_sequence), "jitted"),
            ],
            options.seconds,
            options.least_rounds,
        )
        return {
            "noise": noise(
                *(samples[n, "jitted", "forward"] for n in (FLIP, FLIP + ", again"))
            ),
            "times": summary(samples, lambda key: {FLIP: (FLIP, *key[1:])}),
            "import": _import(options.least_rounds),
            "fresh output": _fresh_output(min(options.least_rounds, 5)),
            f"{CALLS} calls": _many_calls(options.least_rounds),
        }


def _quartiles(values: list[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).round(5).tolist()
    return {"seconds": median, "quartiles": [low, high]}


def _import(times: int) -> dict[str, Any]:
    """What `import jax_revseg` adds to `import jax`, each in a process of its own."""
    return _quartiles([_python(IMPORT) for _ in range(times)])


def _python(program: str, **environment: str) -> float:
    """What the program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _fresh_output(times: int) -> dict[str, float]:
    """`x + 1` of 64 MB on the CPU: a fresh output over a reused one."""
    ways: dict[str, dict[str, str]] = {"default": {}, "huge pages": HUGE_PAGES}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(times):
        for name, environment in ways.items():
            found[name].append(_python(FRESH, JAX_PLATFORMS="cpu", **environment))
    return {name: round(float(np.median(v)), 2) for name, v in found.items()}


def _many_calls(times: int) -> dict[str, Any]:
    """Calls that feed each other, as layers do, beside pastes of the snippet."""
    case = Case("many", (8, 128, 16))
    x, lengths = jnp.ones(case.shape), jnp.full(8, 100)

    def lower(function: Callable[..., jax.Array]) -> Any:
        def many(x: jax.Array, lengths: jax.Array) -> jax.Array:
            for _ in range(CALLS):
                x = -function(x, lengths)
            return x

        return jax.jit(many).lower(x, lengths)

    functions = {OURS: case.call, "take_along_axis": pasted(case)}
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(times):
        for name, function in functions.items():
            start = time.perf_counter()
            lowered = lower(function)
            lowered.compile()
            seconds[name].append(time.perf_counter() - start)
            found[name] = {"stablehlo_bytes": len(lowered.as_text())}
    return {name: found[name] | _quartiles(seconds[name]) for name in functions}

"""What a call costs beside its bytes: dispatch, and import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Contender, Options, Row, measure
from jax_revseg import reverse_sequence

EAGER, JITTED = "jnp.flip", "jnp.flip, jitted"
IMPORT = """
import time, jax
start = time.perf_counter()
import jax_revseg
print(time.perf_counter() - start)
"""


def measure_calls(options: Options) -> Row:
    """Calls on (4, 16, 8), where the bytes cost nothing."""
    x, lengths = jnp.ones((4, 16, 8)), jnp.array([3, 0, 16, 7])
    flip, host = (lambda x: jnp.flip(x, 1)), np.asarray(lengths)

    def contender(name: str, function: Callable[..., Any], *args: Any) -> Contender:
        def run(n: int) -> jax.Array:
            for _ in range(n - 1):
                function(*args)
            return function(*args).block_until_ready()

        return Contender(name, run)

    contenders = [
        contender(EAGER, flip, x),
        contender("reverse_sequence", reverse_sequence, x, lengths),
        contender("reverse_sequence, NumPy lengths", reverse_sequence, x, host),
        contender(JITTED, jax.jit(flip), x),
        contender("reverse_sequence, jitted", jax.jit(reverse_sequence), x, lengths),
    ]
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(5)
    ]
    row = measure(options, [EAGER, JITTED], contenders)
    return dict(group="calls", import_seconds=float(np.median(seconds)), **row)

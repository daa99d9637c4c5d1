"""One call of every public function, and operands for all of them.

Each call takes `x` and a dictionary of everything else, so that a test can say where
each operand lies: on the host, on a device, sharded, closed over.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_revseg
from jax_revseg import reverse_segments, reverse_sequence, scan_segments


@jax.jit  # Outside jit, NumPy's operators and slices move constants from the host.
def step(carry, x):
    return carry + x * x, carry * x


@jax.jit
def scaled(weight, carry, x):
    return carry + weight * x, carry


@jax.jit
def sums(x):
    return jax.lax.cumsum(x, 1)


stack = jax.jit(lambda a, b: jnp.stack([a, b], -1))
both_sums = partial(jax_revseg.bidirectional, sums, sums, merge=stack)
sums_of = partial(jax_revseg.associative_scan_segments, jax.jit(jnp.add))

LINEAR = {
    "lengths": lambda x, o: reverse_sequence(x, o["n"]),
    "lengths value": lambda x, o: reverse_sequence(x, o["n"], padding_value=2),
    "value on device": lambda x, o: reverse_sequence(x, o["n"], padding_value=o["one"]),
    "packed": lambda x, o: reverse_segments(x, o["k"]),
    "ids": lambda x, o: reverse_segments(x, segment_ids=o["ids"], padding_id=0),
    "offsets": lambda x, o: reverse_segments(x, cu_seqlens=o["offsets"]),
    "starts": lambda x, o: reverse_segments(x, starts=o["starts"]),
    "order": lambda x, o: jax_revseg.reverse_segment_order(x, o["k"]),
    "bidirectional": lambda x, o: both_sums(x, o["n"]),
    "bidirectional mask": lambda x, o: both_sums(x, mask=o["mask"]),
    "pack": lambda x, o: jax_revseg.pack_segments(x, o["few"], max_length=3),
    "pack value": lambda x, o: jax_revseg.pack_segments(
        x, o["few"], max_length=3, padding_value=2
    ),
    "unpack": lambda x, o: jax_revseg.unpack_segments(x, o["n"], total_length=9),
}
SCANS = {
    "scan lengths": lambda x, o: scan_segments(step, o["init"], x, o["n"]),
    "scan ids": lambda x, o: scan_segments(
        step, o["init"], x, segment_ids=o["ids"], padding_id=0, reverse=True
    ),
    "scan starts": lambda x, o: scan_segments(
        step, o["init"], x, starts=o["starts"], carry_in=o["carry"], chunk=4
    ),
    "scan mask": lambda x, o: scan_segments(step, o["init"], x, mask=o["mask"]),
    "both": lambda x, o: jax_revseg.bidirectional_scan(
        scaled, (o["one"],) * 2, (o["init"],) * 2, x, o["n"]
    ),
    "associative": lambda x, o: sums_of(x, segment_ids=o["ids"], padding_id=0),
    "associative starts": lambda x, o: sums_of(
        x, starts=o["starts"], carry_in=o["carry"], reverse=True
    ),
}
FUNCTIONS = LINEAR | SCANS
FEW = ("lengths", "packed", "ids", "pack", "unpack", "scan ids", "associative")
FEW = {name: FUNCTIONS[name] for name in FEW}


def operands(n=4, t=6, dtype=np.float32, index=np.int32):
    """Arrays on the host: `x`, of integers, and all else."""
    rng = np.random.default_rng(n + t)
    x = rng.integers(1, 9, (n, t)).astype(dtype)
    k = np.stack([np.full(n, t // 3), np.arange(n) % 2 * (t // 2)], 1)
    ids = np.repeat(np.arange(-(-t // 2)), 2)[:t][None].repeat(n, 0)
    others = {
        "n": np.clip(np.arange(n), 0, t),
        "few": np.arange(n) % 2,
        "k": k,
        "ids": ids,
        "offsets": np.concatenate([k[:, :1] * 0, k.cumsum(1)], 1),
    }
    others = {name: array.astype(index) for name, array in others.items()}
    others |= {"mask": ids > 0, "starts": (ids + np.arange(t)) % 3 == 1}
    init, one = np.zeros(n, dtype), np.ones((), dtype)
    return x, {**others, "init": init, "carry": init + 1, "one": one}


def values(f, x, others):
    """The results of the dtype of `x`, in one list."""
    leaves = jax.tree.leaves(f(x, others))
    return [leaf for leaf in leaves if leaf.dtype == x.dtype]


def everything(x, others, functions=FUNCTIONS):
    """The values and a vector-Jacobian product of each function."""
    out = {}
    for name, f in functions.items():
        out[name], vjp = jax.vjp(partial(values, f, others=others), x)
        out[name] = out[name], vjp(out[name])[0]
    return out


def same_values(actual, desired):
    """Asserts that the results of each function in `desired` are equal."""
    for name in desired:
        pairs = zip(*map(jax.tree.leaves, (actual[name], desired[name])), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b, err_msg=name)

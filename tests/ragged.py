"""What the tests of scans share: ragged rows in each encoding, and Python loops.

The loops take one row, one segment and one valid step at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import _reference


def table(*rows):
    return np.array([[int(digit) for digit in row] for row in rows])


N, T = 4, 7
LENGTHS = np.array([7, 0, 3, 1])
IDS = table("5552255", "0000000", "0110110", "3003000")
OFFSETS = table("0225", "0000", "0777", "0024")
# The first step of a row starts a segment without a mark, too.
STARTS = table("0010010", "1000000", "0000000", "1110001") > 0
MASK = table("1100101", "0000000", "0011111", "1111111") > 0
ENCODINGS = {
    "lengths": dict(lengths=LENGTHS),
    "ids": dict(segment_ids=IDS),
    "ids and padding": dict(segment_ids=IDS, padding_id=0),
    "offsets": dict(cu_seqlens=OFFSETS),
    "starts": dict(starts=STARTS),
    "mask": dict(mask=MASK),
}
PACKED = {k: v for k, v in ENCODINGS.items() if k != "mask"}  # An associative scan's.
LONGER = {  # By a step, so that 2, 4 and 8 devices have blocks of one size.
    name: {
        k: np.concatenate([v, v[:, -1:]], 1) if k in ("segment_ids", "starts") else v
        for k, v in encoding.items()
    }
    for name, encoding in PACKED.items()
}


def split(encoding):
    """An encoding's name, its array, which may be traced, and what is static."""
    (key, segments), *static = encoding.items()
    return key, segments, dict(static)


TRACED = {name: dict([split(e)[:2]]) for name, e in ENCODINGS.items()}


def segments_of_row(n, size=T, *, lengths=None, segment_ids=None, cu_seqlens=None,
                    starts=None, mask=None, padding_id=None):  # fmt: skip
    """For each segment of a row that is not empty, its steps."""
    if mask is not None:
        steps = np.flatnonzero(mask[n]).tolist()
        return [steps] if steps else []
    if lengths is not None:
        bounds = [(0, lengths[n])]
    elif cu_seqlens is not None:
        bounds = zip(cu_seqlens[n][:-1], cu_seqlens[n][1:], strict=True)
    elif starts is not None:
        first = [0, *(t for t in range(1, size) if starts[n][t])]
        bounds = zip(first, [*first[1:], size], strict=True)
    else:
        bounds = _reference.id_bounds(segment_ids[n], padding_id)
    return [list(range(start, end)) for start, end in bounds if start < end]


def valid_steps(shape=(N, T), **encoding):
    valid = np.zeros(shape, bool)
    for n in range(shape[0]):
        for steps in segments_of_row(n, shape[1], **encoding):
            valid[n, steps] = True
    return valid


@jax.jit  # One program for all positions.
def step_of(tree, n, t):
    return jax.tree.map(lambda leaf: leaf[n, t][None], tree)


def row_of(tree, n):
    return jax.tree.map(lambda leaf: leaf[n : n + 1], tree)


concatenate = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))


def loop_by_hand(f, init, xs, carry_in=None, reverse=False, **encoding):
    """The last carry of each row, and all outputs, with zeros at padding."""
    carries, ys = [], []
    rows, size = jax.tree.leaves(xs)[0].shape[:2]
    for n in range(rows):
        start, row = row_of(init, n), {}
        last = start if carry_in is None else row_of(carry_in, n)
        segments = segments_of_row(n, size, **encoding)
        for i, steps in enumerate(segments[::-1] if reverse else segments):
            last = start if i else last
            for t in steps[::-1] if reverse else steps:
                last, row[t] = f(last, step_of(xs, n, t))
        carries.append(last)
        ys.append(row)
    some = next((y for row in ys for y in row.values()), None)
    zero = jax.tree.map(jnp.zeros_like, some)
    stack = partial(jax.tree.map, lambda *y: jnp.stack(y, 1))
    stacked = [stack(*(row.get(t, zero) for t in range(size))) for row in ys]
    return carries, concatenate(*stacked)


def scan_by_hand(f, init, xs, *carry_in, **how):
    """`scan_segments`, in which `f` sees valid steps alone, in batches of one row."""
    carries, ys = loop_by_hand(f, init, xs, *carry_in, **how)
    return concatenate(*carries), ys


def combine_by_hand(fn, elems, *carry_in, **how):
    """`associative_scan_segments`."""

    def step(total, x):
        return (x if total is None else fn(total, x),) * 2

    return loop_by_hand(step, None, elems, *carry_in, **how)[1]


@jax.jit
def join(a, b):
    """Of numbers and their powers of ten: exact, and different for every order."""
    return a[0] * b[1] + b[0], a[1] * b[1]


def digits(rows, size):
    draw = np.random.default_rng(2).integers(1, 10, (rows, size)).astype(np.int32)
    return draw, np.full_like(draw, 10)


def weighted(*trees):
    """A scalar of all floating results, in which each counts differently."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(
        jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in leaves
    )


def gradients(f, *operands):
    """Of the weighted results with respect to all operands; and the results."""

    def loss(operands):
        out = f(*operands)
        return weighted(out), out

    return jax.grad(loss, has_aux=True)(operands)


def close(actual, desired, rtol=2e-5, atol=1e-6):
    same = jax.tree.structure(actual) == jax.tree.structure(desired)
    assert same, (actual, desired)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), b in zip(leaves, jax.tree.leaves(desired), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


same = partial(close, rtol=0, atol=0)

"""What the tests of scans share: ragged rows in each encoding, and Python loops.

The loops take one row, one segment and one valid step at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import _reference

N, T = 4, 7
LENGTHS = np.array([7, 0, 3, 1])
IDS = np.array(
    [
        [5, 5, 5, 2, 2, 5, 5],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [3, 0, 0, 3, 0, 0, 0],
    ]
)
OFFSETS = np.array([[0, 2, 2, 5], [0, 0, 0, 0], [0, 7, 7, 7], [0, 0, 2, 4]])
STARTS = np.array(  # The first step of a row starts a segment without a mark, too.
    [
        [0, 0, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1],
    ],
    bool,
)
MASK = np.array(
    [
        [1, 1, 0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ],
    bool,
)
ENCODINGS = {
    "lengths": dict(lengths=LENGTHS),
    "ids": dict(segment_ids=IDS),
    "ids and padding": dict(segment_ids=IDS, padding_id=0),
    "offsets": dict(cu_seqlens=OFFSETS),
    "starts": dict(starts=STARTS),
    "mask": dict(mask=MASK),
}
PACKED = {k: v for k, v in ENCODINGS.items() if k != "mask"}  # An associative scan's.


def traced(encoding):
    """The part of an encoding that may be traced. `padding_id` is static."""
    return {k: v for k, v in encoding.items() if k != "padding_id"}


TRACED = {name: traced(encoding) for name, encoding in ENCODINGS.items()}


def segments_of_row(n, size=T, *, lengths=None, segment_ids=None, cu_seqlens=None,
                    starts=None, mask=None, padding_id=None):  # fmt: skip
    """For each segment of a row that is not empty, its steps."""
    if mask is not None:
        bounds, steps = [(0, size)], np.flatnonzero(mask[n]).tolist()
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


def scan_by_hand(f, init, xs, carry_in=None, reverse=False, **encoding):
    """`scan_segments`, in which `f` sees valid steps alone, in batches of one row."""
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
    return concatenate(*carries), concatenate(*stacked)


def combine_by_hand(fn, elems, carry_in=None, reverse=False, **encoding):
    """`associative_scan_segments`, with zeros at padding."""
    stacked = []
    rows, size = jax.tree.leaves(elems)[0].shape[:2]
    zero = jax.tree.map(jnp.zeros_like, step_of(elems, 0, 0))
    for n in range(rows):
        row = [zero] * size
        segments = segments_of_row(n, size, **encoding)
        total = None if carry_in is None else row_of(carry_in, n)
        for steps in segments[::-1] if reverse else segments:
            for t in steps[::-1] if reverse else steps:
                x = step_of(elems, n, t)
                total = row[t] = x if total is None else fn(total, x)
            total = None
        stacked.append(jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *row))
    return concatenate(*stacked)


def weighted(*trees):
    """A scalar of all floating results, in which each counts differently."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return sum(
        jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in leaves
    )


def close(actual, desired, rtol=2e-5, atol=1e-6):
    same = jax.tree.structure(actual) == jax.tree.structure(desired)
    assert same, (actual, desired)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), b in zip(leaves, jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


same = partial(close, rtol=0, atol=0)

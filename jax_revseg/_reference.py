"""Reference implementation of a reversal: a NumPy loop, easy to check by eye.

The tests and `python -m jax_revseg` compare against it. Lengths out of range are cut to
the axis, as in JAX arrays.
"""

from __future__ import annotations

import numpy as np


def packed_bounds(lengths, size):
    """The (start, end) of segments laid end to end, cut to the axis."""
    bounds, start = [], 0
    for length in lengths:
        end = min(start + max(int(length), 0), size)
        bounds.append((start, end))
        start = end
    return bounds


def id_bounds(ids, padding_id):
    """The (start, end) of every run of equal ids, except runs of `padding_id`."""
    bounds, start = [], 0
    for t in range(1, len(ids) + 1):
        if t == len(ids) or ids[t] != ids[start]:
            if padding_id is None or ids[start] != padding_id:
                bounds.append((start, t))
            start = t
    return bounds


def rows_of(x, axis, batch_axes):
    """A view of `x` with the batch axes first and then the segment axis."""
    return np.moveaxis(x, (*batch_axes, axis), range(len(batch_axes) + 1))


def reverse(
    x, segments, *, axis, batch_axes, layout, padding_id=None, padding_value=None
):
    """Reverses each segment of each row; everything else stays, or is overwritten."""
    out = x.copy() if padding_value is None else np.full_like(x, padding_value)
    rows, out_rows = (rows_of(a, axis, batch_axes) for a in (x, out))
    for row in np.ndindex(*rows.shape[: len(batch_axes)]):
        if layout == "ids":
            bounds = id_bounds(segments[row], padding_id)
        else:  # A padded row is one packed segment.
            bounds = packed_bounds(np.atleast_1d(segments[row]), x.shape[axis])
        for start, end in bounds:
            for i in range(end - start):
                out_rows[row][start + i] = rows[row][end - 1 - i]
    return out

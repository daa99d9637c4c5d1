"""Reference implementation: NumPy loops, easy to check by eye.

The tests and `python -m jax_revseg` compare against these functions. They take NumPy
arrays; lengths out of range are cut to the axis, as in JAX arrays.
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


def _rows(x, axis, batch_axes):
    """A view of `x` with the batch axes first and then the segment axis."""
    return np.moveaxis(x, (*batch_axes, axis), range(len(batch_axes) + 1))


def reverse(
    x, segments, *, axis, batch_axes, layout, padding_id=None, padding_value=None
):
    """Reverses each segment of each row; everything else stays, or is overwritten."""
    out = x.copy() if padding_value is None else np.full_like(x, padding_value)
    rows, out_rows = _rows(x, axis, batch_axes), _rows(out, axis, batch_axes)
    for row in np.ndindex(*rows.shape[: len(batch_axes)]):
        if layout == "ids":
            bounds = id_bounds(segments[row], padding_id)
        else:  # A padded row is one packed segment.
            bounds = packed_bounds(np.atleast_1d(segments[row]), x.shape[axis])
        for start, end in bounds:
            for i in range(end - start):
                out_rows[row][start + i] = rows[row][end - 1 - i]
    return out


def reverse_order(x, lengths, *, axis, batch_axes):
    """Lays the segments of each row down in the opposite order, each one intact."""
    out, out_lengths = x.copy(), np.zeros_like(lengths)
    rows, out_rows = _rows(x, axis, batch_axes), _rows(out, axis, batch_axes)
    for row in np.ndindex(*lengths.shape[:-1]):
        at, bounds = 0, packed_bounds(lengths[row], x.shape[axis])
        for k, (start, end) in enumerate(reversed(bounds)):
            out_rows[row][at : at + end - start] = rows[row][start:end]
            out_lengths[row][k] = end - start
            at += end - start
    return out, out_lengths


def pack(x, lengths, *, max_length, padding_value=0):
    """One row for each segment, cut at `max_length`, padded at its end."""
    out = np.full((len(lengths), max_length, *x.shape[1:]), padding_value, x.dtype)
    for row, (start, end) in enumerate(packed_bounds(lengths, len(x))):
        for i in range(min(end - start, max_length)):
            out[row, i] = x[start + i]
    return out


def unpack(x, lengths, *, total_length):
    """The valid steps of each row, one row after the other, then zeros."""
    out, steps = np.zeros((total_length, *x.shape[2:]), x.dtype), []
    for row, length in zip(x, lengths, strict=True):
        steps += [*row[: max(int(length), 0)]]
    for t, step in enumerate(steps[:total_length]):
        out[t] = step
    return out

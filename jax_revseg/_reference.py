"""What is right: NumPy loops that anyone can check by eye.

These are the oracle of the tests and of `python -m jax_revseg`. They take host arrays
and host lengths that are already valid (or cut to the axis, as on a device), and are as
slow as they look.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def padded_bounds(length: int, size: int) -> list[tuple[int, int]]:
    """The (start, end) of the one segment of a row, cut to the axis."""
    return [(0, min(max(int(length), 0), size))]


def packed_bounds(lengths: np.ndarray, size: int) -> list[tuple[int, int]]:
    """The (start, end) of segments laid end to end, cut to the axis."""
    bounds, start = [], 0
    for length in lengths:
        end = min(start + max(int(length), 0), size)
        bounds.append((start, end))
        start = end
    return bounds


def id_bounds(ids: np.ndarray, padding_id: int | None) -> list[tuple[int, int]]:
    """The (start, end) of every run of equal ids, except runs of `padding_id`."""
    bounds, start = [], 0
    for t in range(1, len(ids) + 1):
        if t == len(ids) or ids[t] != ids[start]:
            if padding_id is None or ids[start] != padding_id:
                bounds.append((start, t))
            start = t
    return bounds


def _rows(
    x: np.ndarray, segments: np.ndarray, axis: int, batch_axes: tuple[int, ...]
) -> Iterator[tuple[tuple[int | slice, ...], np.ndarray, int]]:
    """For each row: its index in `x`, its segments, and where its segment axis went."""
    for row in np.ndindex(*(x.shape[a] for a in batch_axes)):
        index: list[int | slice] = [slice(None)] * x.ndim
        for a, i in zip(batch_axes, row, strict=True):
            index[a] = i
        yield tuple(index), segments[row], axis - sum(a < axis for a in batch_axes)


def reverse(
    x: np.ndarray,
    segments: np.ndarray,
    *,
    axis: int,
    batch_axes: tuple[int, ...],
    layout: str,
    padding_id: int | None = None,
    padding_value: object = None,
) -> np.ndarray:
    """Reverses each segment of each row; everything else stays, or is overwritten."""
    out = x.copy() if padding_value is None else np.full_like(x, padding_value)
    for index, row_segments, row_axis in _rows(x, segments, axis, batch_axes):
        row_in = np.moveaxis(x[index], row_axis, 0)
        row_out = np.moveaxis(out[index], row_axis, 0)  # A view: writes reach `out`.
        if layout == "padded":
            bounds = padded_bounds(int(row_segments), x.shape[axis])
        elif layout == "packed":
            bounds = packed_bounds(row_segments, x.shape[axis])
        else:
            bounds = id_bounds(row_segments, padding_id)
        for start, end in bounds:
            for i in range(end - start):
                row_out[start + i] = row_in[end - 1 - i]
    return out


def reverse_order(
    x: np.ndarray, lengths: np.ndarray, *, axis: int, batch_axes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Lays the segments of each row down in the opposite order, each one intact."""
    out, out_lengths = x.copy(), np.zeros_like(lengths)
    rows = np.ndindex(*lengths.shape[:-1])
    for row, (index, row_lengths, row_axis) in zip(
        rows, _rows(x, lengths, axis, batch_axes), strict=True
    ):
        row_in = np.moveaxis(x[index], row_axis, 0)
        row_out = np.moveaxis(out[index], row_axis, 0)
        at = 0
        bounds = packed_bounds(row_lengths, x.shape[axis])
        for k, (start, end) in enumerate(reversed(bounds)):
            row_out[at : at + end - start] = row_in[start:end]
            out_lengths[(*row, k)] = end - start
            at += end - start
    return out, out_lengths


def pack(
    x: np.ndarray, lengths: np.ndarray, *, max_length: int, padding_value: object = 0
) -> np.ndarray:
    """One row for each segment, cut at `max_length`, padded at its end."""
    out = np.full((len(lengths), max_length, *x.shape[1:]), padding_value, x.dtype)
    for n, (start, end) in enumerate(packed_bounds(lengths, len(x))):
        for i in range(min(end - start, max_length)):
            out[n, i] = x[start + i]
    return out


def unpack(x: np.ndarray, lengths: np.ndarray, *, total_length: int) -> np.ndarray:
    """The valid steps of each row, one row after the other, then zeros."""
    out, at = np.zeros((total_length, *x.shape[2:]), x.dtype), 0
    for row, length in zip(x, lengths, strict=True):
        for step in row[: max(int(length), 0)]:
            if at < total_length:
                out[at] = step
                at += 1
    return out

"""The segment axis sharded: whole rows for a moment, then blocks again.

A reversal needs whole rows, and a device holds a block of every row. One `all_to_all`
gives each device all of some rows or features; the reversal is then a local one; a
second `all_to_all` brings the blocks back. On two devices, x with rows a to d:

    device 0: a0 b0 c0 d0     device 0: a0 a1 b0 b1     device 0: A0 B0 C0 D0
    device 1: a1 b1 c1 d1 --> device 1: c0 c1 d0 d1 --> device 1: A1 B1 C1 D1

So a device sends all but its own share of its block, twice, and never holds more than
a few times its block. Transposed, an `all_to_all` is an `all_to_all`: the gradient is
the same exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import jax
from jax import lax

from jax_revseg._layout import Segments

AxisName = str | tuple[str, ...]


def axis_size(name: str, axis_name: AxisName | None) -> int:
    """The number of blocks that the segment axis is cut into."""
    if axis_name is None:
        return 1
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{name}: axis_name is {axis_name!r}, but no such axis is mapped here; "
            "call inside jax.shard_map over a mesh that has it, or leave axis_name out "
            "where the segment axis is not sharded."
        ) from None


def _exchange_axis(shape: tuple[int, ...], segments: Segments, devices: int) -> int:
    """The axis to cut in the place of the segment axis: the one padded least."""

    def cost(a: int) -> tuple[Fraction, bool]:
        padded = -(-shape[a] // devices) * devices
        # Cutting a batch axis cuts the lengths as well, so features come first. Ids are
        # blocks themselves: cut along the batch they are exchanged like x, where
        # features need all of them on each device.
        return Fraction(padded, shape[a]), (a in segments.batch_axes) != (
            segments.layout == "ids"
        )

    return min((a for a in range(len(shape)) if a != segments.axis), key=cost)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    missing = -x.shape[axis] % multiple
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return lax.concatenate([x, lax.full_like(x, 0, shape=shape)], axis)


def on_whole_rows(
    reverse: Callable[[jax.Array, Segments], jax.Array],
    x: jax.Array,
    segments: Segments,
    axis_name: AxisName | None,
) -> jax.Array:
    """`reverse(x, segments)`, where x (and ids) are one block of the segment axis."""
    if axis_name is None or 0 in x.shape:
        return reverse(x, segments)
    if x.ndim == 1:
        return on_whole_rows(reverse, x[:, None], segments, axis_name)[:, 0]
    values, axis, batch_axes, layout, _ = segments
    devices = lax.axis_size(axis_name)
    cut = _exchange_axis(x.shape, segments, devices)
    if cut in batch_axes:
        row = batch_axes.index(cut)
        values = _pad(values, row, devices)
        if layout == "ids":
            values = lax.all_to_all(values, axis_name, row, values.ndim - 1, tiled=True)
        else:
            rows = values.shape[row] // devices
            first = lax.axis_index(axis_name) * rows
            values = lax.dynamic_slice_in_dim(values, first, rows, row)
    elif layout == "ids":
        values = lax.all_gather(values, axis_name, axis=values.ndim - 1, tiled=True)
    rows = lax.all_to_all(_pad(x, cut, devices), axis_name, cut, axis, tiled=True)
    out = reverse(rows, segments._replace(values=values))
    out = lax.all_to_all(out, axis_name, axis, cut, tiled=True)
    return lax.slice_in_dim(out, 0, x.shape[cut], axis=cut)

"""A sharded segment axis: exchange blocks for whole rows, and back.

A reversal needs whole rows, but each device holds a block of every row. One
`all_to_all` gives each device all of some rows or features, the reversal is local, and
a second `all_to_all` restores the blocks. On two devices, x with rows a to d:

    device 0: a0 b0 c0 d0     device 0: a0 a1 b0 b1     device 0: A0 B0 C0 D0
    device 1: a1 b1 c1 d1 --> device 1: c0 c1 d0 d1 --> device 1: A1 B1 C1 D1

A device sends all but its own share of its block, twice. If an axis other than the
segment axis is as large as the number of devices, a device holds a few times its block.
Otherwise padding is exchanged too: a device holds at least one whole row of one
feature, many times its block. The transpose of an `all_to_all` is an `all_to_all`: the
gradient makes the same exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_revseg._arguments import Call
from jax_revseg._layout import Layout
from jax_revseg._lowering import pad_to_multiple


def whole_rows(
    call: Call, x: jax.Array, segments: Any, layout: Layout
) -> tuple[jax.Array, Any, Callable[[jax.Array], jax.Array]]:
    """Exchanges a block for whole rows; returns x, segments, and the way back.

    The rows are those of some batch entries or features. Ids and starts are blocks too.
    """
    if call.axis_name is None or 0 in x.shape:
        return x, segments, lambda out: out
    if x.ndim == 1:
        x, segments, back = whole_rows(call, x[:, None], segments, layout)
        return x, segments, lambda out: back(out)[:, 0]
    name, devices, axis = call.axis_name, call.devices, layout.axis
    cut = _exchange_axis(x.shape, layout, devices)

    def restore(out: jax.Array) -> jax.Array:
        out = lax.all_to_all(out, name, axis, cut, tiled=True)
        return lax.slice_in_dim(out, 0, x.shape[cut], axis=cut)

    whole = lax.all_to_all(
        pad_to_multiple(x, cut, devices), name, cut, axis, tiled=True
    )
    return whole, _segments_of_rows(call, segments, layout, cut), restore


def _exchange_axis(shape: tuple[int, ...], layout: Layout, devices: int) -> int:
    """Returns the axis to cut in place of the segment axis: the one padded least."""

    def cost(a: int) -> tuple[float, bool]:
        # Prefer a feature axis; with ids or starts prefer a batch axis, which avoids an
        # all_gather of them.
        is_batch = a in layout.batch_axes
        return -shape[a] % devices / shape[a], is_batch != layout.per_step

    return min((a for a in range(len(shape)) if a != layout.axis), key=cost)


def _segments_of_rows(call: Call, segments: Any, layout: Layout, cut: int) -> Any:
    """Returns the segments of the rows that this device gets."""
    name, devices, last = call.axis_name, call.devices, segments.ndim - 1
    if cut not in layout.batch_axes:
        if layout.per_step:
            return lax.all_gather(segments, name, axis=last, tiled=True)
        return segments
    row = layout.batch_axes.index(cut)
    segments = pad_to_multiple(segments, row, devices)
    if layout.per_step:
        return lax.all_to_all(segments, name, row, last, tiled=True)
    rows = segments.shape[row] // devices
    return lax.dynamic_slice_in_dim(segments, lax.axis_index(name) * rows, rows, row)

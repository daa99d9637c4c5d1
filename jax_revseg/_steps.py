"""The steps of a recurrence: which are valid, which start a segment, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path as leaves_of

from jax_revseg import _compat
from jax_revseg._arguments import Call
from jax_revseg._boundaries import shift
from jax_revseg._layout import Layout
from jax_revseg._lowering import (
    align,
    clip_lengths,
    last_end,
    packed_ends,
    position_dtype,
    starts_of,
)
from jax_revseg._primitive import bind
from jax_revseg._segments import parse_arrays


def parse_steps(
    call: Call, name: str, xs: Any, axis: int | None, **encodings: Any
) -> tuple[Any, Any, Layout]:
    """Returns arrays, segments and layout; raises if the segment axis is sharded."""
    xs, segments, layout = parse_arrays(call, name, xs, axis, **encodings)
    checked = [(f"{name}{keystr(p)}", x, layout.axis) for p, x in leaves_of(xs)]
    if layout.per_step:
        checked.append(("the segments", segments, segments.ndim - 1))
    for what, array, axis in checked:
        if (over := jax.typeof(array).sharding.spec[axis]) is not None:
            call.fail(
                f"axis {axis} of {what}, the segment axis, is sharded over mesh axis "
                f"{over!r}, but a scan runs along it; replicate that axis with "
                "jax.sharding.reshard."
            )
    return xs, segments, layout


def _positions(call: Call, batch: Any, size: Any) -> tuple[Any, jax.Array]:
    """The position of the first step of this block, and of each step."""
    dtype = position_dtype(size * call.devices)
    t, start = lax.broadcasted_iota(dtype, (*batch, size), len(batch)), 0
    if call.axis_name is not None:
        start = lax.axis_index(call.axis_name).astype(dtype) * size
    return start, t + start


def _neighbours(call: Call, values: jax.Array, by: int) -> jax.Array:
    """Shifts by one step, across the blocks of a sharded axis; zero at its end."""
    out = shift(values, by)
    if call.axis_name is None:
        return out
    edge = values[..., -1:] if by > 0 else values[..., :1]
    pairs = [(i, i + by) for i in range(call.devices) if 0 <= i + by < call.devices]
    edge = lax.ppermute(edge, call.axis_name, pairs)
    sides = [edge, out[..., 1:]] if by > 0 else [out[..., :-1], edge]
    return jnp.concatenate(sides, -1)


def _checked(ends: jax.Array, segments: Any, size: Any, layout: Layout) -> jax.Array:
    # Under checkify this bind checks the lengths. Without features it moves nothing.
    batch = ends.shape[: len(layout.batch_axes)]
    layout = layout._replace(axis=len(batch), batch_axes=tuple(range(len(batch))))
    nothing = bind(jnp.zeros((*batch, size, 0), bool), segments, layout)
    zero = jnp.sum(nothing, (-2, -1), dtype=ends.dtype)
    return ends + lax.expand_dims(zero, range(zero.ndim, ends.ndim))


def _packed_starts(ends: jax.Array, t: jax.Array, start: Any, layout: Layout) -> Any:
    """Whether a packed segment starts at each position of a block from `start` on."""
    begins, last = starts_of(ends), t.ndim - 1
    inside = jnp.clip(ends - start, 0, t.shape[-1])
    layout = layout._replace(axis=last, batch_axes=tuple(range(last)))
    # The source of a step plus the step is start + end - 1: one number a segment.
    keys = t + bind(t, inside - starts_of(inside), layout)
    first = ((begins == start) & (begins < ends)).any(-1, keepdims=True)
    return ((keys != shift(keys, 1)) & (t != start)) | (first & (t == start))


def masks(
    call: Call, segments: Any, size: Any, layout: Layout
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which steps are valid, and which start a segment or are padding.

    Each is of shape `(*batch, size)`. The first is None if all are valid, the second if
    a row has one segment.
    """
    if layout.kind == "mask":  # A masked step holds the carry.
        return segments, None
    batch = segments.shape[: len(layout.batch_axes)]
    start, t = _positions(call, batch, size)
    if layout.kind == "starts":
        return None, segments | (t == 0)
    if layout.kind == "ids":
        starts = (segments != _neighbours(call, segments, 1)) | (t == 0)
        if layout.padding_id is None:
            return None, starts
        valid = segments != jnp.asarray(layout.padding_id, segments.dtype)
        return valid, starts | ~valid
    total = size * call.devices
    if layout.kind == "padded":
        end = _checked(clip_lengths(segments, total), segments, total, layout)
        return t < end[..., None], None
    ends = _checked(packed_ends(segments, total), segments, total, layout)
    valid = t < last_end(ends)[..., None]
    return valid, _packed_starts(ends, t, start, layout) | ~valid


def resets(call: Call, valid: Any, starts: Any, reverse: bool) -> jax.Array:
    """`starts` in the direction of the scan: reversed, where a segment ends."""
    if not reverse:
        return starts
    _, t = _positions(call, starts.shape[:-1], starts.shape[-1])
    last = t == starts.shape[-1] * call.devices - 1
    ends = _neighbours(call, starts, -1) | last
    return ends if valid is None else ends | ~valid


def first_steps(call: Call, valid: Any, like: jax.Array, reverse: bool) -> jax.Array:
    """Whether a step is the first valid one of its row in the scan's direction."""
    batch, size = like.shape[:-1], like.shape[-1]
    _, t = _positions(call, batch, size)
    if valid is None:
        return t == (size * call.devices - 1 if reverse else 0)
    local = lax.broadcasted_iota(jnp.int32, like.shape, len(batch))
    out = valid & (local == first_index(valid, reverse))
    if call.axis_name is not None:
        blocks = lax.all_gather(valid.any(-1, keepdims=True), call.axis_name)
        i, own = jnp.arange(call.devices), lax.axis_index(call.axis_name)
        before = lax.expand_dims(i > own if reverse else i < own, range(1, blocks.ndim))
        out &= ~(blocks & before).any(0)
    return out


def first_index(valid: jax.Array, reverse: bool) -> jax.Array:
    """The index of the first valid step of each row, `(*batch, 1)`; else of an end."""
    if not reverse:
        return jnp.argmax(valid, -1, keepdims=True)
    return valid.shape[-1] - 1 - jnp.argmax(jnp.flip(valid, -1), -1, keepdims=True)


def take_step(x: jax.Array, index: jax.Array, layout: Layout) -> jax.Array:
    """Takes one step of each row; the segment axis stays, with size 1."""
    index = align(index, x.ndim, layout)
    return jnp.take_along_axis(x, index, layout.axis, mode="promise_in_bounds")


def first_valid(x: jax.Array, valid: jax.Array, reverse: bool, layout: Layout):
    """The first valid step of each row, as a constant; the segment axis has size 1."""
    first = take_step(x, first_index(valid, reverse), layout)
    if _is_key(x):
        return first  # Any key is as good as another.
    some = valid.any(-1)
    first = lend(first, some, layout.batch_axes)
    # Without a valid step anywhere, roots, logarithms and quotients are smooth here.
    default = 0.5 if jnp.issubdtype(x.dtype, jnp.inexact) else 1
    first = jnp.where(some.any(), first, jnp.full_like(first, default))
    return lax.stop_gradient(first)


def fill_padding(x: jax.Array, valid: Any, layout: Layout) -> jax.Array:
    """Replaces padding by the first valid step of the row."""
    if 0 in x.shape or _is_key(x):
        return x
    first = first_valid(x, valid, False, layout)
    return jnp.where(align(valid, x.ndim, layout), x, first)


def lend(rows: jax.Array, some: jax.Array, batch_axes: Sequence[int]) -> jax.Array:
    """Gives a row without a valid step the entry of the first row that has one.

    A function that is undefined at any value of ours is defined there.
    """
    if not batch_axes or 0 in rows.shape:
        return rows

    def take(rows, some):
        index = lax.argmax(some.ravel(), 0, jnp.uint32)
        starts, sizes = [jnp.uint32(0)] * rows.ndim, list(rows.shape)
        for a, n in zip(reversed(batch_axes), reversed(some.shape), strict=True):
            starts[a], sizes[a] = index % n if len(batch_axes) > 1 else index, 1
            index = index // n
        other = lax.stop_gradient(lax.dynamic_slice(rows, starts, sizes))
        order = sorted(range(some.ndim), key=batch_axes.__getitem__)
        others = [a for a in range(rows.ndim) if a not in batch_axes]
        some = lax.expand_dims(lax.transpose(some, order), others)
        return jnp.where(some, rows, other)

    return _compat.automatic(take, jax.typeof(rows).sharding)(rows, some)


def select(mask: jax.Array, a: Any, b: Any) -> Any:
    """Takes `a` in the rows where the mask is true, else `b`."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(lax.expand_dims(mask, range(mask.ndim, a.ndim)), a, b)

    return jax.tree.map(leaf, a, b)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.extended)


def zero_padding(tree: Any, valid: jax.Array) -> Any:
    """Sets the rows where `valid` is false to zero; keys have no zero."""

    def leaf(x: jax.Array) -> jax.Array:
        return x if _is_key(x) else select(valid, x, jnp.zeros((), x.dtype))

    return jax.tree.map(leaf, tree)

"""The steps of a recurrence: which are valid, which start a segment, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_revseg import _compat
from jax_revseg._arguments import Call
from jax_revseg._boundaries import shift
from jax_revseg._layout import Layout
from jax_revseg._lowering import (
    clip_lengths,
    gather_rows,
    last_end,
    packed_ends,
    position_dtype,
    starts_of,
    with_features,
)
from jax_revseg._primitive import bind


class Steps(NamedTuple):
    """The steps of a block of rows, in the direction of a scan.

    All lie like `x` without its features: so the marks of a user are not transposed.
    """

    valid: Any  # None if all are.
    starts: Any  # Where a segment starts, or is padding; None for a mask.
    first: Any  # The index of the first valid step, or -1; the time axis has size 1.


def _positions(call: Call, shape: Any, at: int) -> tuple[Any, jax.Array]:
    """The position of the first step of this block, and of each step."""
    dtype, start = position_dtype(shape[at] * call.devices), 0
    if call.axis_name is not None:
        start = lax.axis_index(call.axis_name).astype(dtype) * shape[at]
    return start, start + lax.broadcasted_iota(dtype, shape, at)


def _neighbours(call: Call, values: jax.Array, by: int, at: int) -> jax.Array:
    """Shifts by one step, across the blocks of a sharded axis; zero at its end."""
    out = shift(values, by, axis=at)
    if call.axis_name is None:
        return out
    edge = lax.index_in_dim(values, -1 if by > 0 else 0, at)
    pairs = [(i, i + by) for i in range(call.devices) if 0 <= i + by < call.devices]
    edge = lax.ppermute(edge, call.axis_name, pairs)
    rest = lax.slice_in_dim(out, max(by, 0), out.shape[at] + min(by, 0), axis=at)
    return jnp.concatenate([edge, rest] if by > 0 else [rest, edge], at)


def _checked(ends: jax.Array, segments: Any, size: Any, layout: Layout) -> jax.Array:
    # Under checkify this bind checks the lengths. Without features it moves nothing.
    batch = ends.shape[: len(layout.batch_axes)]
    layout = layout._replace(axis=len(batch), batch_axes=tuple(range(len(batch))))
    nothing = bind(jnp.zeros((*batch, size, 0), bool), segments, layout)
    zero = jnp.sum(nothing, (-2, -1), dtype=ends.dtype)
    return ends + lax.expand_dims(zero, range(zero.ndim, ends.ndim))


def _inside(end: jax.Array, start: Any, size: Any) -> jax.Array:
    """How many positions of a block from `start` on lie before `end`."""
    return jnp.minimum(jnp.maximum(end, start) - start, size)


def _packed_starts(ends: jax.Array, t: jax.Array, start: Any, layout: Layout) -> Any:
    """Whether a packed segment starts at each position of a block from `start` on."""
    begins, last = starts_of(ends), t.ndim - 1
    inside = _inside(ends, start, t.shape[-1])
    layout = layout._replace(axis=last, batch_axes=tuple(range(last)))
    # The source of a step plus the step is start + end - 1: one number a segment.
    keys = t + bind(t, inside - starts_of(inside), layout)
    first = ((begins == start) & (begins < ends)).any(-1, keepdims=True)
    return ((keys != shift(keys, 1)) & (t != start)) | (first & (t == start))


def _valid_and_starts(call: Call, marks: Any, zero: Any, at: int, layout: Layout):
    """The masks of an encoding that has an entry for each step."""
    if layout.kind == "mask":  # A masked step holds the carry.
        return marks, None
    if layout.kind == "starts":
        return None, marks | zero
    starts = (marks != _neighbours(call, marks, 1, at)) | zero
    if layout.padding_id is None:
        return None, starts
    return marks != jnp.asarray(layout.padding_id, marks.dtype), starts


def find_steps(
    call: Call, segments: Any, size: Any, layout: Layout, reverse: bool = False
) -> Steps:
    """Finds the steps in the segments of a call; `size` is that of a block."""
    if size == 0:
        return Steps(None, None, None)
    at, kind, total = layout.time_axis, layout.kind, size * call.devices
    order = sorted(range(len(layout.batch_axes)), key=layout.batch_axes.__getitem__)
    shape = [segments.shape[i] for i in order]
    shape.insert(at, size)
    start, t = _positions(call, shape, at)
    local = lax.broadcasted_iota(jnp.int32, shape, at)
    first = lax.index_in_dim(local, -1 if reverse else 0, at)
    valid = starts = None
    if layout.per_step:
        marks = jnp.moveaxis(segments, -1, at)
        valid, starts = _valid_and_starts(call, marks, t == 0, at, layout)
        if valid is not None:
            back = local if reverse else size - 1 - local
            back = jnp.max(jnp.where(valid, back, -1), at, keepdims=True)
            first = back if reverse else jnp.where(back < 0, back, size - 1 - back)
    else:
        if kind == "padded":
            end = _checked(clip_lengths(segments, total), segments, total, layout)
        else:
            ends = _checked(packed_ends(segments, total), segments, total, layout)
            end = last_end(ends)
            starts = _packed_starts(ends, jnp.moveaxis(t, at, -1), start, layout)
            starts = jnp.moveaxis(starts, -1, at)
        end = lax.expand_dims(lax.transpose(end, order), [at])
        valid, count = t < end, _inside(end, start, size).astype(jnp.int32)
        first = (count if reverse else jnp.minimum(count, 1)) - 1
        if kind == "padded":
            starts = t == (end - 1 if reverse else 0)
    if starts is not None:
        padding = False if valid is None else ~valid
        if reverse and kind != "padded":  # A segment starts at its end.
            starts = _neighbours(call, starts | padding, -1, at) | (t == total - 1)
        starts |= padding
    return Steps(valid, starts, first)


def enters(call: Call, steps: Steps, at: int, reverse: bool) -> jax.Array:
    """`steps.first`, or -1 where the row's first valid step is in another block."""
    if call.axis_name is None:
        return steps.first
    blocks = lax.all_gather(steps.first >= 0, call.axis_name)
    i, own = jnp.arange(call.devices), lax.axis_index(call.axis_name)
    before = lax.expand_dims(i > own if reverse else i < own, range(1, blocks.ndim))
    return jnp.where((blocks & before).any(0), -1, steps.first)


def is_at(index: jax.Array, like: jax.Array, at: int) -> jax.Array:
    """Whether a step has the index of its row."""
    return lax.broadcasted_iota(index.dtype, like.shape, at) == index


def take_step(x: jax.Array, index: jax.Array, layout: Layout) -> jax.Array:
    """Takes one step of each row; the segment axis stays, with size 1."""
    return gather_rows(x, jnp.maximum(index, 0), layout)


def first_valid(x: jax.Array, first: jax.Array, layout: Layout) -> jax.Array:
    """The first valid step of each row, as a constant; the segment axis has size 1."""
    step = take_step(x, first, layout)
    if _is_key(x):
        return step  # Any key is as good as another.
    some = lax.squeeze(first >= 0, [layout.time_axis])
    # Without a valid step anywhere, roots, logarithms and quotients are smooth here.
    default = 0.5 if jnp.issubdtype(x.dtype, jnp.inexact) else 1
    step = jnp.where(some.any(), step, jnp.full_like(step, default))
    return lend(step, some, sorted(layout.batch_axes))


def fill_padding(x: jax.Array, steps: Steps, layout: Layout) -> jax.Array:
    """Replaces padding by the first valid step of the row."""
    if 0 in x.shape or _is_key(x):
        return x
    first = first_valid(x, steps.first, layout)
    return jnp.where(with_features(steps.valid, x.ndim, layout), x, first)


def lend(rows: jax.Array, some: jax.Array, batch_axes: Sequence[int]) -> jax.Array:
    """Gives a row without a valid step the entry of the first row that has one.

    A function that is undefined at any value of ours is defined there. The results are
    constants.
    """
    rows = lax.stop_gradient(rows)
    if not batch_axes or 0 in rows.shape:
        return rows

    def take(rows, some):
        front, own = range(some.ndim), partial(lax.broadcasted_iota, jnp.int32)
        first = jnp.unravel_index(jnp.argmax(some), some.shape)
        index = (jnp.where(some, own(some.shape, a), first[a]) for a in front)
        # A gather, because XLA:CPU writes it to memory: it would compute a selection
        # again in each of many loops.
        taken = jnp.moveaxis(rows, batch_axes, front).at[*index]
        return jnp.moveaxis(taken.get(mode="promise_in_bounds"), front, batch_axes)

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

"""From segments to a source index, and from the source index to one XLA gather.

Output position `t` of a segment that covers `[start, end)` reads input position
`start + end - 1 - t`; every other position reads itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def position_dtype(size: int) -> jnp.dtype:
    """The dtype of positions and lengths on an axis of this size, symbolic or not."""
    wide = isinstance(size, int) and size > jnp.iinfo(jnp.int32).max
    return jnp.dtype(jnp.uint32 if wide else jnp.int32)


def widen(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths in the dtype of positions, or the limit of it that they pass."""
    dtype = position_dtype(size)
    own, to = jnp.iinfo(lengths.dtype), jnp.iinfo(dtype)
    if own.min < to.min:
        lengths = jnp.maximum(lengths, jnp.asarray(to.min, lengths.dtype))
    if own.max > to.max:
        lengths = jnp.minimum(lengths, jnp.asarray(to.max, lengths.dtype))
    return lengths.astype(dtype)


def clip_lengths(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths in `[0, size]`, in the dtype of positions."""
    lengths = widen(lengths, size)
    if isinstance(size, int):  # A Python integer past 2**31 is refused as an operand.
        size = np.asarray(size, lengths.dtype)
    return jnp.clip(lengths, 0, size)


def packed_sums(lengths: jax.Array, size: int) -> jax.Array:
    """The running sum of packed lengths: exact up to `size`, then above `size`."""
    # The sum of K lengths may pass 2**32 and wrap. The first sum that passes `size` has
    # not wrapped yet, and the running maximum keeps it.
    sums = lax.cumsum(clip_lengths(lengths, size).astype(jnp.uint32), lengths.ndim - 1)
    return lax.cummax(sums, lengths.ndim - 1)


def packed_ends(lengths: jax.Array, size: int) -> jax.Array:
    """The end of each packed segment, cut at `size`."""
    limit = np.uint32(size) if isinstance(size, int) else size
    ends = jnp.minimum(packed_sums(lengths, size), limit)
    return ends.astype(position_dtype(size))


def source_index(segments: jax.Array, size: int, layout: str, padding_id: int | None):
    """For each row and position, the position that it reads: `(*batch, size)`."""
    batch = segments.shape if layout == "padded" else segments.shape[:-1]
    t = lax.broadcasted_iota(position_dtype(size), (*batch, size), len(batch))
    if layout == "padded":
        end = clip_lengths(segments, size)[..., None]
        return t + (t < end) * (end - 1 - 2 * t)
    if layout == "packed":
        ends = packed_ends(segments, size)
        starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], -1)
        k = jnp.sum(t[..., None] >= ends[..., None, :], -1)
        end = jnp.take_along_axis(ends, k, -1, mode="clip")
        start = jnp.take_along_axis(starts, k, -1, mode="clip")
        return jnp.where(t < ends[..., -1:], start + end - 1 - t, t)
    changes = segments[..., 1:] != segments[..., :-1]
    if padding_id is not None:
        changes |= segments[..., 1:] == padding_id
    edge = jnp.ones_like(changes, shape=(*batch, 1))
    is_start = jnp.concatenate([edge, changes], -1)
    is_end = jnp.concatenate([changes, edge], -1)
    start = lax.cummax(jnp.where(is_start, t, 0), len(batch))
    end = lax.cummin(jnp.where(is_end, t, size - 1), len(batch), reverse=True)
    return start + end - t


def padding_mask(
    segments: jax.Array, size: int, layout: str, padding_id: int | None
) -> jax.Array:
    """Whether each position is outside all segments: `(*batch, size)`."""
    if layout == "ids":
        return segments == padding_id
    if layout == "padded":
        end = clip_lengths(segments, size)[..., None]
    else:
        end = packed_ends(segments, size)[..., -1:]
    return lax.broadcasted_iota(end.dtype, (*end.shape[:-1], size), end.ndim - 1) >= end


def align(
    values: jax.Array, ndim: int, axis: int, batch_axes: tuple[int, ...]
) -> jax.Array:
    """Brings `(*batch, size)` into the order of the axes of an `x` of rank `ndim`."""
    axes = (*batch_axes, axis)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    others = [a for a in range(ndim) if a not in axes]
    return lax.expand_dims(lax.transpose(values, order), others)


def reverse_gather(
    x: jax.Array,
    segments: jax.Array,
    *,
    axis: int,
    batch_axes: tuple[int, ...],
    layout: str,
    padding_id: int | None = None,
) -> jax.Array:
    """Gathers `x` along `axis`; indices cover the batch axes and the segment axis."""
    if 0 in x.shape:  # A gather cannot have an empty axis before JAX 0.8.
        return x
    index = source_index(segments, x.shape[axis], layout, padding_id)
    axes = sorted((*batch_axes, axis))
    rows = sorted(batch_axes)
    index = align(index, x.ndim, axis, batch_axes)
    index = index.reshape(*(x.shape[a] for a in axes), 1)
    return lax.gather(
        x,
        index,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(a for a in range(x.ndim) if a not in axes),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
            operand_batching_dims=tuple(rows),
            start_indices_batching_dims=tuple(axes.index(a) for a in rows),
        ),
        slice_sizes=tuple(1 if a in axes else n for a, n in enumerate(x.shape)),
        mode="promise_in_bounds",
    )

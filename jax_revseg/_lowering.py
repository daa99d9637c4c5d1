"""From segments to a source index, and from the source index to one XLA gather.

Output position `t` of a segment that covers `[start, end)` reads input position
`start + end - 1 - t`; every other position reads itself.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_revseg import _compat
from jax_revseg._boundaries import reverse_between, shift, to_words
from jax_revseg._layout import Layout
from jax_revseg._linear import compiled


def position_dtype(size: int) -> np.dtype:
    """The dtype of positions and lengths on an axis of this size, symbolic or not."""
    wide = isinstance(size, int) and size >= 2**31
    return np.dtype(np.uint32 if wide else np.int32)


def saturate(lengths: jax.Array, size: int) -> jax.Array:
    """Casts lengths to the position dtype, at most `size`; negative ones may remain."""
    dtype = position_dtype(size)
    own, to = jnp.iinfo(lengths.dtype), jnp.iinfo(dtype)
    if own.min < to.min:
        lengths = jnp.maximum(lengths, jnp.asarray(to.min, lengths.dtype))
    if own.max > to.max:
        lengths = jnp.minimum(lengths, jnp.asarray(to.max, lengths.dtype))
    # JAX refuses a Python integer past 2**31 as an operand.
    limit = np.asarray(size, dtype) if isinstance(size, int) else size
    return jnp.minimum(lengths.astype(dtype), limit)


def clip_lengths(lengths: jax.Array, size: int) -> jax.Array:
    """Clips lengths to `[0, size]`, in the dtype of positions."""
    return jnp.maximum(saturate(lengths, size), 0)


def packed_sums(lengths: jax.Array, size: int) -> jax.Array:
    """The running sum of packed lengths: exact up to `size`, then above `size`."""
    count = lengths.shape[-1]
    lengths = clip_lengths(lengths, size)
    if isinstance(count, int) and isinstance(size, int) and count * size < 2**31:
        return lax.cumsum(lengths, lengths.ndim - 1)  # ONNX Runtime sums no uint32.
    lengths = lengths.astype(jnp.uint32)
    sums = lax.cumsum(lengths, lengths.ndim - 1)
    # A sum that is less than its last term has wrapped, for the first time well past
    # `size`; from there on the running maximum keeps the largest number.
    sums = jnp.maximum(sums, -(sums < lengths).astype(jnp.uint32))
    return lax.cummax(sums, lengths.ndim - 1)


def packed_ends(lengths: jax.Array, size: int) -> jax.Array:
    """The end of each packed segment, cut at `size`."""
    sums = packed_sums(lengths, size)
    limit = np.asarray(size, sums.dtype) if isinstance(size, int) else size
    return jnp.minimum(sums, limit).astype(position_dtype(size))


def last_end(ends: jax.Array) -> jax.Array:
    """The end of the last packed segment; 0 where there is none."""
    some = ends.shape[-1] != 0
    return ends[..., -1] if some else jnp.zeros(ends.shape[:-1], ends.dtype)


def starts_of(ends: jax.Array) -> jax.Array:
    """The start of each packed segment: the end of the segment before."""
    return shift(ends, 1)


def _padded_index(lengths, size):
    # Negative lengths need no clamp here; an unsigned index spares the gather its sign
    # test.
    end = saturate(lengths, size)[..., None]
    t = lax.broadcasted_iota(end.dtype, (*lengths.shape, size), lengths.ndim)
    return jnp.where(t < end, end - 1 - t, t).astype(jnp.uint32)


def start_words(starts: jax.Array, ends: jax.Array, size: int) -> jax.Array:
    """Words of bits that mark the starts of packed segments that are not empty."""
    last = starts.ndim - 1
    rows = tuple(range(last))
    # Such segments have different starts, so addition sets their bits.
    return lax.scatter_add(
        jnp.zeros_like(ends, shape=(*ends.shape[:-1], size // 32 + 1)),
        starts[..., None] >> 5,
        (starts < ends).astype(jnp.uint32) << (starts & 31),
        lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(last,),
            scatter_dims_to_operand_dims=(last,),
            operand_batching_dims=rows,
            scatter_indices_batching_dims=rows,
        ),
        mode="promise_in_bounds",
    )


def _packed_index(lengths, size):
    ends = packed_ends(lengths, size).astype(jnp.uint32)
    words = start_words(starts_of(ends), ends, size)
    # Each position of the tail is its own segment, and so is the end of the axis.
    first = 32 * lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    valid = jnp.maximum(ends[..., -1:], first) - first
    words |= jnp.where(valid < 32, ~jnp.uint32(0) << (valid & 31), 0)
    return reverse_between(words, size)


def _index_per_step(segments, size, layout):
    last = segments.ndim - 1
    side = [(0, 0, 0)] * last
    zero = jnp.zeros((), segments.dtype)
    after = lax.pad(segments, zero, [*side, (0, 1, 0)])
    t = lax.broadcasted_iota(jnp.uint32, after.shape, last)
    starts = (t == 0) | (t == jnp.asarray(size, jnp.uint32))
    if layout.kind == "starts":
        starts |= after
    else:
        starts |= lax.pad(segments, zero, [*side, (1, 0, 0)]) != after
    if layout.padding_id is not None:  # Each position of padding is its own segment.
        starts |= after == jnp.asarray(layout.padding_id, segments.dtype)
    return reverse_between(to_words(starts), size)


def source_index(segments: jax.Array, size: int, layout: Layout) -> jax.Array:
    """For each row and position, the position to read: `(*batch, size)`."""
    if layout.kind == "padded":
        return _padded_index(segments, size)
    if layout.kind == "packed":
        return _packed_index(segments, size)
    return _index_per_step(segments, size, layout)


def padding_mask(segments: jax.Array, size: int, layout: Layout) -> jax.Array:
    """Whether each position is outside all segments: `(*batch, size)`."""
    if layout.per_step:
        if layout.padding_id is None:
            return jnp.zeros_like(segments, bool)
        return segments == jnp.asarray(layout.padding_id, segments.dtype)
    if layout.kind == "padded":
        end = clip_lengths(segments, size)
    else:
        end = last_end(packed_ends(segments, size))
    t = lax.broadcasted_iota(end.dtype, (*end.shape, size), end.ndim)
    return t >= end[..., None]


def align(values: jax.Array, ndim: int, layout: Layout) -> jax.Array:
    """Brings `(*batch, size)` into the axis order of an `x` of rank `ndim`."""
    axes = (*layout.batch_axes, layout.axis)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return with_features(lax.transpose(values, order), ndim, layout)


def with_features(values: jax.Array, ndim: int, layout: Layout) -> jax.Array:
    """Gives values that lie like `x` without its features the axes of `x`."""
    axes = (*layout.batch_axes, layout.axis)
    return lax.expand_dims(values, [a for a in range(ndim) if a not in axes])


def pad_to_multiple(x: Any, axis: int, multiple: int, value: Any = 0) -> jax.Array:
    """Lengthens an axis to a multiple."""
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return lax.concatenate([x, lax.full_like(x, value, shape=shape)], axis)


def fill(x: jax.Array, segments: Any, value: Any, layout: Layout) -> jax.Array:
    """Writes a scalar into the padding of `x`."""
    if isinstance(value, np.ndarray) and not _compat.staged():
        value = jax.device_put(value)  # Explicitly, for `jax.transfer_guard`.
    return _fill(x, segments, value, layout=layout)


@compiled
def _fill(x, segments, value, *, layout):
    if 0 in x.shape:  # For an empty array, `where` returns the value's type.
        return x
    mask = padding_mask(segments, x.shape[layout.axis], layout)
    return jnp.where(align(mask, x.ndim, layout), value, x)


def to_bits(x: jax.Array) -> jax.Array:
    """Bitcasts small floats to integers.

    XLA may handle small floats in a wider format, which changes NaN payloads. Floats of
    4 bits have no NaN, and XLA:CPU cannot compile their bitcast in some loops.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
        if 8 <= bits <= 16:
            return lax.bitcast_convert_type(x, f"uint{bits}")
    return x


def _gather(x, index, axis, rows, window):
    """Gathers by an index of shape `(rows, axis, 1)`, or `(rows, 1)` for a window."""
    indexed = sorted((*rows, *(() if window else (axis,))))
    return lax.gather(
        x,
        index,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(a for a in range(x.ndim) if a not in indexed),
            collapsed_slice_dims=() if window else (axis,),
            start_index_map=(axis,),
            operand_batching_dims=tuple(rows),
            start_indices_batching_dims=tuple(indexed.index(a) for a in rows),
        ),
        slice_sizes=tuple(
            1 if a in indexed else n // 2 if a == axis else n
            for a, n in enumerate(x.shape)
        ),
        mode="promise_in_bounds",
    )


def gather_rows(x, index, layout):
    """Indexes the segment axis by an index that lies like `x` without its features."""
    if 0 in x.shape:  # A gather cannot have an empty axis before JAX 0.8.
        size = index.shape[layout.time_axis]
        return lax.slice_in_dim(x, 0, size, axis=layout.axis)
    rows = sorted(layout.batch_axes)
    return _gather(x, index[..., None], layout.axis, rows, window=False)


def _reverse_rows(x, segments, layout):
    """Indexes the batch axes and the segment axis; features move in one piece."""
    axis, batch_axes = layout.axis, layout.batch_axes
    index = align(source_index(segments, x.shape[axis], layout), x.ndim, layout)
    index = index.reshape(*(x.shape[a] for a in sorted((*batch_axes, axis))), 1)
    return _gather(x, index, axis, sorted(batch_axes), window=False)


def _reverse_windows(x, lengths, layout):
    """Gathers one window a row, where the row gather reads single elements.

    Padded by its own size on the left, a row's first `length` positions are the end of
    the window that starts at `length`; reversed, the window starts with them. Nothing
    of this is written to memory, and a CPU reads windows as vectors.
    """
    axis, batch_axes = layout.axis, layout.batch_axes
    size = x.shape[axis]
    order = sorted(range(lengths.ndim), key=batch_axes.__getitem__)
    starts = lax.transpose(clip_lengths(lengths, size), order)[..., None]

    def window(values, extra):
        padding = [(size + extra if a == axis else 0, 0, 0) for a in range(x.ndim)]
        values = lax.pad(values, jnp.zeros((), values.dtype), padding)
        values = _gather(values, starts + extra, axis, sorted(batch_axes), window=True)
        return lax.rev(values, (axis,))

    # Window the mask too, so that XLA vectorises the select. Wide elements shift it by
    # one step: a shared index would be written to memory.
    apart = int(x.dtype.itemsize >= 4)
    return lax.select(window(jnp.ones_like(x, dtype=bool), apart), window(x, 0), x)


def _single_elements(x: jax.Array, axis: int) -> bool:
    """Whether neighbours on `axis` are neighbours in memory."""
    # Keys cannot be padded, and a window needs twice the positions.
    size = x.shape[axis]
    return (
        not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        and all(n == 1 for n in x.shape[axis + 1 :])
        and isinstance(size, int)
        and size < 2**31 - 1
    )


def reverse_gather(
    x: jax.Array, segments: jax.Array, *, layout: Layout, windows: bool = False
) -> jax.Array:
    """Reverses segments by one gather; `windows` allows windows for single elements."""
    # A gather cannot have an empty axis before JAX 0.8.
    if 0 in x.shape or (layout.kind == "packed" and segments.shape[-1] == 0):
        return x
    bits = to_bits(x)
    if windows and layout.kind == "padded" and _single_elements(x, layout.axis):
        out = _reverse_windows(bits, segments, layout)
    else:
        out = _reverse_rows(bits, segments, layout)
    return out if bits is x else lax.bitcast_convert_type(out, x.dtype)

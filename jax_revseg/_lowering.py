"""From segments to a source index, and from the source index to one XLA gather.

Output position `t` of a segment that covers `[start, end)` reads input position
`start + end - 1 - t`; every other position reads itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_revseg._boundaries import reverse_between, to_words


def position_dtype(size: int) -> np.dtype:
    """The dtype of positions and lengths on an axis of this size, symbolic or not."""
    wide = isinstance(size, int) and size >= 2**31
    return np.dtype(np.uint32 if wide else np.int32)


def widen(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths in the dtype of positions, or the limit of it that they pass."""
    dtype = position_dtype(size)
    own, to = jnp.iinfo(lengths.dtype), jnp.iinfo(dtype)
    if own.min < to.min:
        lengths = jnp.maximum(lengths, jnp.asarray(to.min, lengths.dtype))
    if own.max > to.max:
        lengths = jnp.minimum(lengths, jnp.asarray(to.max, lengths.dtype))
    return lengths.astype(dtype)


def cut_lengths(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths of at most `size`, negative ones too, in the dtype of positions."""
    lengths = widen(lengths, size)
    # A Python integer past 2**31 is refused as an operand.
    limit = np.asarray(size, lengths.dtype) if isinstance(size, int) else size
    return jnp.minimum(lengths, limit)


def clip_lengths(lengths: jax.Array, size: int) -> jax.Array:
    """Lengths in `[0, size]`, in the dtype of positions."""
    return jnp.maximum(cut_lengths(lengths, size), 0)


def packed_sums(lengths: jax.Array, size: int) -> jax.Array:
    """The running sum of packed lengths: exact up to `size`, then above `size`."""
    count = lengths.shape[-1]
    lengths = clip_lengths(lengths, size).astype(jnp.uint32)
    sums = lax.cumsum(lengths, lengths.ndim - 1)
    if isinstance(count, int) and isinstance(size, int) and count * size < 2**32:
        return sums
    # A sum that is less than its last term has wrapped, for the first time well past
    # `size`; from there on the running maximum keeps the largest number.
    sums = jnp.maximum(sums, -(sums < lengths).astype(jnp.uint32))
    return lax.cummax(sums, lengths.ndim - 1)


def packed_ends(lengths: jax.Array, size: int) -> jax.Array:
    """The end of each packed segment, cut at `size`."""
    limit = np.uint32(size) if isinstance(size, int) else size
    ends = jnp.minimum(packed_sums(lengths, size), limit)
    return ends.astype(position_dtype(size))


def _padded_index(lengths, size):
    # Time-major this is computed for every row of every step, beside which a few
    # features are little to move: no position is before a negative end, and an index
    # without a sign need not be compared with 0 by the gather.
    end = cut_lengths(lengths, size)[..., None]
    t = lax.broadcasted_iota(end.dtype, (*lengths.shape, size), lengths.ndim)
    return jnp.where(t < end, end - 1 - t, t).astype(jnp.uint32)


def _packed_index(lengths, size):
    last = lengths.ndim - 1
    rows = tuple(range(last))
    ends = packed_ends(lengths, size).astype(jnp.uint32)
    starts = lax.pad(ends, jnp.uint32(0), [(0, 0, 0)] * last + [(1, -1, 0)])
    # The starts of segments that are not empty differ, so that adding sets their bits.
    words = lax.scatter_add(
        jnp.zeros_like(ends, shape=(*lengths.shape[:-1], size // 32 + 1)),
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
    # Each position of the tail is a segment of its own, and so is the end of the axis.
    first = 32 * lax.broadcasted_iota(jnp.uint32, words.shape, last)
    valid = jnp.maximum(ends[..., -1:], first) - first
    words |= jnp.where(valid < 32, ~jnp.uint32(0) << (valid & 31), 0)
    return reverse_between(words, size)


def _ids_index(ids, size, padding_id):
    last = ids.ndim - 1
    side = [(0, 0, 0)] * last
    zero = jnp.zeros((), ids.dtype)
    before = lax.pad(ids, zero, [*side, (1, 0, 0)])
    after = lax.pad(ids, zero, [*side, (0, 1, 0)])
    t = lax.broadcasted_iota(jnp.uint32, before.shape, last)
    starts = (before != after) | (t == 0) | (t == jnp.asarray(size, jnp.uint32))
    if padding_id is not None:  # Each position of padding is a segment of its own.
        starts |= after == jnp.asarray(padding_id, ids.dtype)
    return reverse_between(to_words(starts), size)


def source_index(segments: jax.Array, size: int, layout: str, padding_id: int | None):
    """For each row and position, the position that it reads: `(*batch, size)`."""
    if layout == "padded":
        return _padded_index(segments, size)
    if layout == "packed":
        return _packed_index(segments, size)
    return _ids_index(segments, size, padding_id)


def padding_mask(
    segments: jax.Array, size: int, layout: str, padding_id: int | None
) -> jax.Array:
    """Whether each position is outside all segments: `(*batch, size)`."""
    if layout == "ids":
        return segments == jnp.asarray(padding_id, segments.dtype)
    if layout == "padded":
        end = clip_lengths(segments, size)[..., None]
    else:
        side = [(0, 0, 0)] * (segments.ndim - 1)
        end = packed_ends(segments, size)
        end = lax.pad(end, jnp.zeros((), end.dtype), [*side, (1, 0, 0)])[..., -1:]
    return lax.broadcasted_iota(end.dtype, (*end.shape[:-1], size), end.ndim - 1) >= end


def align(
    values: jax.Array, ndim: int, axis: int, batch_axes: tuple[int, ...]
) -> jax.Array:
    """Brings `(*batch, size)` into the order of the axes of an `x` of rank `ndim`."""
    axes = (*batch_axes, axis)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    others = [a for a in range(ndim) if a not in axes]
    return lax.expand_dims(lax.transpose(values, order), others)


def _as_integers(x: jax.Array) -> jax.Array:
    # XLA may handle small floats in a wider format, which changes the payload of NaNs.
    # Those of 4 bits have none, and XLA:CPU cannot compile their bitcast in some loops.
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


def _reverse_rows(x, segments, axis, batch_axes, layout, padding_id):
    """Indices for the batch axes and the segment axis, everything else in one piece."""
    index = source_index(segments, x.shape[axis], layout, padding_id)
    index = align(index, x.ndim, axis, batch_axes)
    indexed = sorted((*batch_axes, axis))
    index = index.reshape(*(x.shape[a] for a in indexed), 1)
    return _gather(x, index, axis, sorted(batch_axes), window=False)


def _reverse_windows(x, lengths, axis, batch_axes):
    """The same for one segment a row, by one index a row instead of one a position.

    Padded by its own size on the left, a row's first `length` positions are the end of
    the window that starts at `length`; reversed, the window starts with them. Nothing
    of this is written to memory, and a CPU reads windows as vectors, where it reads
    indexed single elements one by one.
    """
    size = x.shape[axis]
    order = sorted(range(lengths.ndim), key=batch_axes.__getitem__)
    starts = lax.transpose(clip_lengths(lengths, size), order)[..., None]

    def window(values, extra):
        padding = [(size + extra if a == axis else 0, 0, 0) for a in range(x.ndim)]
        values = lax.pad(values, jnp.zeros((), values.dtype), padding)
        values = _gather(values, starts + extra, axis, sorted(batch_axes), window=True)
        return lax.rev(values, (axis,))

    # The mask goes through a window too, so that its comparison is much the same. With
    # the very same window it is the same, and small elements gain by that; but then a
    # CPU writes the index, which both share, to memory.
    apart = int(x.dtype.itemsize >= 4)
    return lax.select(window(jnp.ones_like(x, dtype=bool), apart), window(x, 0), x)


def _single_elements(x: jax.Array, axis: int) -> bool:
    """Whether neighbours on `axis` are neighbours in memory, for `_reverse_windows`."""
    # Keys cannot be padded, and a window needs twice the positions.
    size = x.shape[axis]
    return (
        not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        and all(n == 1 for n in x.shape[axis + 1 :])
        and isinstance(size, int)
        and size < 2**31 - 1
    )


def reverse_gather(
    x: jax.Array,
    segments: jax.Array,
    *,
    axis: int,
    batch_axes: tuple[int, ...],
    layout: str,
    padding_id: int | None = None,
    windows: bool = False,
) -> jax.Array:
    """Gathers `x` along `axis`; with `windows`, single elements in padded rows too."""
    # A gather cannot have an empty axis before JAX 0.8.
    if 0 in x.shape or (layout == "packed" and segments.shape[-1] == 0):
        return x
    bits = _as_integers(x)
    if windows and layout == "padded" and _single_elements(x, axis):
        out = _reverse_windows(bits, segments, axis, batch_axes)
    else:
        out = _reverse_rows(bits, segments, axis, batch_axes, layout, padding_id)
    return out if bits is x else lax.bitcast_convert_type(out, x.dtype)

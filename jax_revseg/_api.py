"""The public reversals: arguments in, one bind out."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_revseg import _compat, _layout
from jax_revseg._layout import BatchAxis, Integers, Segments
from jax_revseg._lowering import align, packed_ends, padding_mask
from jax_revseg._primitive import Implementation, reverse_segments_p
from jax_revseg._sequence import AxisName, axis_size, on_whole_rows


@lru_cache(maxsize=4096)
def _compiled(**params: Any) -> Callable[..., jax.Array]:
    return jax.jit(partial(reverse_segments_p.bind, **params))


def _bind(x: jax.Array, segments: Segments, implementation: str) -> jax.Array:
    values, axis, batch_axes, layout, padding_id = segments
    params = dict(
        axis=axis,
        batch_axes=batch_axes,
        layout=layout,
        padding_id=padding_id,
        implementation=implementation,
    )
    if not _compat.staged(x, values):
        return _compiled(**params)(x, values)  # Half the time of an eager bind.
    # Inside shard_map the result differs between devices wherever the segments do. If
    # `x` did not say so, the transpose would not know that it must sum over them.
    missing = _compat.varying(jax.typeof(values)) - _compat.varying(jax.typeof(x))
    x = _compat.pvary(x, missing)
    return reverse_segments_p.bind(x, values, **params)


def _reverse(
    name: str,
    x: jax.Array,
    segments: Segments,
    padding_value: Any,
    implementation: str,
) -> jax.Array:
    if padding_value is None:
        return _bind(x, segments, implementation)
    value = _layout.as_padding_value(name, x.dtype, padding_value)
    out = _bind(x, segments, implementation)
    values, axis, batch_axes, layout, padding_id = segments
    if layout == "ids" and padding_id is None:
        return out  # No position is padding.
    mask = padding_mask(values, x.shape[axis], layout, padding_id)
    return jnp.where(align(mask, x.ndim, axis, batch_axes), value, out)


def _reverse_order(x: jax.Array, segments: Segments, implementation: str) -> jax.Array:
    """Lays the segments of each row down in the opposite order."""
    # Reversing all that is valid puts the segments in the opposite order, each of them
    # reversed; so each one is reversed first. That is done by the lengths as they were
    # given: checkify looks at those.
    each = _bind(x, segments, implementation)
    ends = packed_ends(segments.values, x.shape[segments.axis])
    total = jnp.max(ends, -1, initial=0)  # Without an `ends[..., -1]` where K is 0.
    return _bind(each, segments._replace(values=total, layout="padded"), implementation)


def reverse_sequence(
    x: ArrayLike,
    lengths: Integers,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Reverses the first `lengths[n]` steps of each row; padding stays where it is.

    For a row of length `n`, `out[i] = x[n - 1 - i]` for `0 <= i < n`, and `out[i] =
    x[i]` elsewhere. Values move unchanged, bit for bit (but `padding_value` may change
    the payload of a NaN of 16 bits or less). The function is its own inverse and its
    own gradient.

    Lengths given as Python or NumPy values are checked at once, also under `jit`.
    Lengths on a device, or traced, are not waited for: a negative length counts as 0,
    one past the end as the size of the axis. Under `jax.experimental.checkify` those
    raise.

    Args:
        x: Array of rank 1 or more and any dtype, `(N, T, ...)` by default.
        lengths: Integers, in steps, one for each row: the shape of the batch axes of
            `x`, `(N,)` by default. A scalar reverses axis 0 of one unbatched sequence.
        axis: The segment axis of `x`, the one that is reversed. The default is the one
            right after the batch axes, `lengths.ndim`. For a time-major `(T, N, ...)`
            give `axis=0`.
        batch_axis: The axis or axes of `x` that go with the axes of `lengths`, in that
            order. The default is the first ones other than `axis`.
        padding_value: Scalar that is written to the padding; `x` gets no gradient
            there. The default keeps the padding.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
            the segment axis is sharded. `x` is then the local block, and `lengths`
            still count from the start of the whole axis.
        implementation: `"xla"`, a gather, or `"pallas"`, a kernel for TPUs; what that
            does not cover, other platforms among it, is gathered all the same.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not an array, `lengths` or an axis is not an integer, or
            `padding_value` does not fit the dtype of `x`.
        ValueError: `lengths` does not have the shape of the batch axes, an axis is out
            of range or named twice, a length from the host lies outside the axis, or
            `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import reverse_sequence
        >>> x = jnp.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
        >>> reverse_sequence(x, jnp.array([3, 5]))
        Array([[3, 2, 1, 0, 0],
               [8, 7, 6, 5, 4]], dtype=int32)

    Source: Caffe2's `ReversePackedSegs` (which is time-major), TensorFlow's
    `reverse_sequence`, ONNX's `ReverseSequence`.
    """
    name = "reverse_sequence"
    x = _layout.as_array(name, x)
    blocks = axis_size(name, axis_name)
    segments = _layout.padded(name, x, lengths, axis, batch_axis, blocks)
    reverse = partial(
        _reverse, name, padding_value=padding_value, implementation=implementation
    )
    return on_whole_rows(reverse, x, segments, axis_name)


def reverse_segments(
    x: ArrayLike,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    padding_id: int | None = None,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Reverses each of several segments a row; segments keep their places.

    A segment that covers `[s, s + n)` becomes `out[s + i] = x[s + n - 1 - i]`; every
    position outside all segments stays as it is. Exactly one of `lengths`,
    `segment_ids` and `cu_seqlens` says where the segments lie. The function is its own
    inverse and its own gradient.

    Values given as Python or NumPy values are checked at once, also under `jit`. On a
    device, or traced, they are not waited for: a negative length (or a decreasing
    offset) counts as an empty segment, and segments are cut at the end of the axis.
    Under `jax.experimental.checkify` those raise.

    Args:
        x: Array of rank 1 or more and any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `(*batch, K)`, in steps: segments laid end to end
            from position 0. A length of 0 is an empty segment. What follows the last
            segment is padding.
        segment_ids: Integers of shape `(*batch, T)`: every maximal run of equal ids is
            a segment.
        cu_seqlens: Integers of shape `(*batch, K + 1)`: cumulative offsets from 0, as
            variable-length attention kernels take them. Only their differences count
            on a device.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
            A mask is `segment_ids=mask.astype(int), padding_id=0`.
        axis: The segment axis of `x`. The default is the one right after the batch
            axes.
        batch_axis: The axis or axes of `x` that go with the batch axes of the encoding,
            in that order. The default is the first ones other than `axis`.
        padding_value: Scalar that is written to the padding; `x` gets no gradient
            there. The default keeps the padding.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
            the segment axis is sharded. `x` and `segment_ids` are then local blocks;
            `lengths` and `cu_seqlens` still describe the whole axis.
        implementation: `"xla"`, a gather, or `"pallas"`, a kernel for TPUs; what that
            does not cover, other platforms among it, is gathered all the same.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not an array, an encoding or an axis is not an integer, or
            `padding_value` does not fit the dtype of `x`.
        ValueError: Not exactly one encoding is given, its shape does not go with `x`,
            an axis is out of range or named twice, or values from the host are
            negative, decrease, or pass the end of the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import reverse_segments
        >>> x = jnp.array([1, 2, 3, 4, 5, 0, 0])
        >>> reverse_segments(x, [2, 3])
        Array([2, 1, 5, 4, 3, 0, 0], dtype=int32)
        >>> ids = jnp.array([1, 1, 2, 2, 2, 0, 0])
        >>> reverse_segments(x, segment_ids=ids, padding_id=0)
        Array([2, 1, 5, 4, 3, 0, 0], dtype=int32)
        >>> reverse_segments(x, cu_seqlens=[0, 2, 5])
        Array([2, 1, 5, 4, 3, 0, 0], dtype=int32)

    Source: Caffe2's `ReversePackedSegs` on segments that are laid end to end.
    """
    name = "reverse_segments"
    x = _layout.as_array(name, x)
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    given = [argument for argument, value in encodings.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{name}: got {' and '.join(given) or 'none'} of {', '.join(encodings)}; "
            "give exactly one of them."
        )
    if padding_id is not None and segment_ids is None:
        raise ValueError(
            f"{name}: padding_id is {padding_id!r}, but the segments are given by "
            f"{given[0]}; padding_id goes with segment_ids only: leave it out."
        )
    blocks = axis_size(name, axis_name)
    if segment_ids is not None:
        segments = _layout.ids(
            name, x, segment_ids, padding_id, axis, batch_axis, blocks
        )
    elif cu_seqlens is not None:
        segments = _layout.offsets(name, x, cu_seqlens, axis, batch_axis, blocks)
    else:
        segments = _layout.packed(name, x, lengths, axis, batch_axis, blocks)
    reverse = partial(
        _reverse, name, padding_value=padding_value, implementation=implementation
    )
    return on_whole_rows(reverse, x, segments, axis_name)


def reverse_segment_order(
    x: ArrayLike,
    lengths: Integers,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    axis_name: AxisName | None = None,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Lays the segments of each row down in the opposite order, each one intact.

    What follows the last segment stays as it is. Called again with the lengths that it
    returns, the function undoes itself. Lengths from the host are checked; on a device
    a negative one counts as 0, and segments are cut at the end of the axis.

    Args:
        x: Array of rank 1 or more and any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `(*batch, K)`, in steps: segments laid end to end.
        axis: The segment axis of `x`. The default is the one right after the batch
            axes.
        batch_axis: The axis or axes of `x` that go with the batch axes of `lengths`, in
            that order. The default is the first ones other than `axis`.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of them, over which
            the segment axis is sharded. `x` is then the local block, and `lengths`
            still count from the start of the whole axis.
        implementation: `"xla"`, a gather, or `"pallas"`, a kernel for TPUs; what that
            does not cover, other platforms among it, is gathered all the same.

    Returns:
        The array, of the shape and dtype of `x`, and the lengths of its segments, of
        the shape of `lengths` (as they were cut, in the opposite order).

    Raises:
        TypeError: `x` is not an array, or `lengths` or an axis is not an integer.
        ValueError: The shape of `lengths` does not go with `x`, an axis is out of range
            or named twice, or lengths from the host are negative or pass the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import reverse_segment_order
        >>> out, lengths = reverse_segment_order(jnp.array([1, 2, 3, 4, 5, 0]), [2, 3])
        >>> out
        Array([3, 4, 5, 1, 2, 0], dtype=int32)
        >>> lengths
        Array([3, 2], dtype=int32)
    """
    name = "reverse_segment_order"
    x = _layout.as_array(name, x)
    blocks = axis_size(name, axis_name)
    segments = _layout.packed(name, x, lengths, axis, batch_axis, blocks)
    reverse = partial(_reverse_order, implementation=implementation)
    out = on_whole_rows(reverse, x, segments, axis_name)
    ends = packed_ends(segments.values, blocks * x.shape[segments.axis])
    starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], -1)
    return out, jnp.flip(ends - starts, -1).astype(segments.values.dtype)

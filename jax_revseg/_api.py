"""The public reversals: arguments in, one bind out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_revseg import _compat
from jax_revseg._arguments import AxisName, BatchAxis, Call, Integers
from jax_revseg._layout import Layout
from jax_revseg._linear import compiled
from jax_revseg._lowering import fill, last_end, packed_ends, starts_of
from jax_revseg._primitive import bind
from jax_revseg._segments import parse_segments
from jax_revseg._sharded_axis import whole_rows

_compiled_bind = jax.jit(bind, static_argnums=2)  # Half the time of an eager bind.


def _reverse(x: jax.Array, segments: Any, layout: Layout) -> jax.Array:
    return (bind if _compat.staged() else _compiled_bind)(x, segments, layout)


@compiled
def _totals(x, lengths, *, axis):
    return last_end(packed_ends(lengths, x.shape[axis]))


@compiled
def _reversed_lengths(x, lengths, *, axis, devices):
    ends = packed_ends(lengths, x.shape[axis] * devices)
    return jnp.flip(ends - starts_of(ends), -1).astype(lengths.dtype)


def reverse_rows(
    call: Call, x: jax.Array, segments: Any, layout: Layout, padding_value: Any = None
) -> jax.Array:
    """Reverses the segments of checked arguments; `bidirectional` enters here."""
    restore = None
    if call.axis_name is not None:
        x, segments, restore = whole_rows(call, x, segments, layout)
    out = _reverse(x, segments, layout)
    if padding_value is not None:
        out = fill(out, segments, padding_value, layout)
    return out if restore is None else restore(out)


def reverse_sequence(
    x: ArrayLike,
    lengths: Integers,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Reverses the first `lengths[n]` steps of each row; padding stays where it is.

    For a row of length `n`, `out[i] = x[n - 1 - i]` for `0 <= i < n`, and `out[i] =
    x[i]` elsewhere. Values move unchanged, bit for bit (only `padding_value` may change
    the payload of a NaN of 16 bits or less). The function is its own inverse and its
    own gradient.

    Python and NumPy lengths are checked at the call, also under `jit`. Lengths in JAX
    arrays are clipped to `[0, T]`; under `jax.experimental.checkify` lengths out of
    range raise.

    Args:
        x: Array of rank 1 or more and any dtype, `(N, T, ...)` by default.
        lengths: Integers, in steps, one for each row: the shape of the batch axes of
            `x`, `(N,)` by default. A scalar reverses axis 0 of one unbatched sequence.
        axis: The segment axis of `x`, the axis to reverse. The default is the axis
            right after the batch axes, `lengths.ndim`. For time-major data `(T, N,
            ...)` pass `axis=0`.
        batch_axis: The axis or axes of `x` that go with the axes of `lengths`, in that
            order. The default is the first axes other than `axis`.
        padding_value: Scalar to write into the padding; the gradient of `x` is zero
            there. The default keeps the padding.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of mesh axes, over
            which the segment axis is sharded. `x` is then the local block, and
            `lengths` count from the start of the global axis.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not an array, `lengths` or an axis is not an integer, or the
            dtype of `x` cannot hold `padding_value`.
        ValueError: `lengths` does not have the shape of the batch axes, an axis is out
            of range or named twice, or a host length lies outside the axis.

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
    call = Call("reverse_sequence", "x", axis_name)
    x = call.array(x)
    segments, layout = parse_segments(call, x, axis, batch_axis, lengths=lengths)
    value = call.scalar(padding_value, x)
    return reverse_rows(call, x, segments, layout, value)


def reverse_segments(
    x: ArrayLike,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    starts: Any = None,
    padding_id: int | None = None,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Reverses each of several segments a row; segments keep their places.

    A segment that covers `[s, s + n)` becomes `out[s + i] = x[s + n - 1 - i]`; every
    position outside all segments stays as it is. Exactly one of `lengths`,
    `segment_ids`, `cu_seqlens` and `starts` says where the segments lie. The function
    is its own inverse and its own gradient.

    Python and NumPy values are checked at the call, also under `jit`. In JAX arrays a
    negative length or a decreasing offset counts as an empty segment, and segments end
    at the end of the axis; under `jax.experimental.checkify` these values raise.

    For one length a row, of shape `(N,)`, use `reverse_sequence`: here lengths of shape
    `(K,)` describe K segments along axis 0. K > 1 segments along an axis 0 of size K
    are refused as a likely mistake, unless `axis=0` is given.

    Args:
        x: Array of rank 1 or more and any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `(*batch, K)`, in steps: segments laid end to end
            from position 0. A length of 0 is an empty segment. The positions after the
            last segment are padding.
        segment_ids: Integers, one for each position: every maximal run of equal ids is
            a segment. Their axes lie like those of `x`: `(*batch, T)` by default, `(T,
            *batch)` with `axis=0`.
        cu_seqlens: Integers of shape `(*batch, K + 1)`: cumulative offsets from 0, as
            variable-length attention kernels take them. In a JAX array only their
            differences count.
        starts: Booleans that lie like `segment_ids`, true at the first step of each
            segment. The first step of a row is a start, marked or not.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
            For a mask pass `segment_ids=mask.astype(int), padding_id=0`.
        axis: The segment axis of `x`. The default is the axis right after the batch
            axes.
        batch_axis: The axis or axes of `x` that go with the batch axes of the encoding,
            in that order. The default is the first axes other than `axis`.
        padding_value: Scalar to write into the padding; the gradient of `x` is zero
            there. The default keeps the padding.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of mesh axes, over
            which the segment axis is sharded. `x` and `segment_ids` are then local
            blocks; `lengths` and `cu_seqlens` describe the global axis.

    Returns:
        Array of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not an array, an encoding or an axis is not an integer, or the
            dtype of `x` cannot hold `padding_value`.
        ValueError: Not exactly one encoding is given, its shape does not fit `x`, an
            axis is out of range or named twice, or host values are negative, decrease,
            or pass the end of the axis.

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

    Source: Caffe2's `ReversePackedSegs`, applied to segments that are laid end to end.
    """
    call = Call("reverse_segments", "x", axis_name)
    x = call.array(x)
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    encodings.update(starts=starts, padding_id=padding_id, lengths_kind="packed")
    segments, layout = parse_segments(call, x, axis, batch_axis, **encodings)
    value = call.scalar(padding_value, x)
    return reverse_rows(call, x, segments, layout, value)


def reverse_segment_order(
    x: ArrayLike,
    lengths: Integers,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Puts the segments of each row into the opposite order, each one intact.

    The positions after the last segment stay as they are. A second call with the
    returned lengths restores `x`. Host lengths are checked; in JAX arrays a negative
    length counts as 0, and segments end at the end of the axis.

    Args:
        x: Array of rank 1 or more and any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `(*batch, K)`, in steps: segments laid end to end.
        axis: The segment axis of `x`. The default is the axis right after the batch
            axes.
        batch_axis: The axis or axes of `x` that go with the batch axes of `lengths`, in
            that order. The default is the first axes other than `axis`.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of mesh axes, over
            which the segment axis is sharded. `x` is then the local block, and
            `lengths` describe the global axis.

    Returns:
        The array, of the shape and dtype of `x`, and the lengths of its segments in the
        new order, clipped, of the shape of `lengths`.

    Raises:
        TypeError: `x` is not an array, or `lengths` or an axis is not an integer.
        ValueError: The shape of `lengths` does not fit `x`, an axis is out of range or
            named twice, or host lengths are negative or pass the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import reverse_segment_order
        >>> out, lengths = reverse_segment_order(jnp.array([1, 2, 3, 4, 5, 0]), [2, 3])
        >>> out
        Array([3, 4, 5, 1, 2, 0], dtype=int32)
        >>> lengths
        Array([3, 2], dtype=int32)
    """
    call = Call("reverse_segment_order", "x", axis_name)
    x = call.array(x)
    segments, layout = parse_segments(
        call, x, axis, batch_axis, lengths_kind="packed", lengths=lengths
    )
    whole, lengths_there, restore = whole_rows(call, x, segments, layout)
    # Reversing the whole valid part puts the segments into the opposite order, each of
    # them reversed; so each one is reversed first.
    each = _reverse(whole, lengths_there, layout)
    totals = _totals(whole, lengths_there, axis=layout.axis)
    out = _reverse(each, totals, layout._replace(kind="padded"))
    devices, axis = call.devices, layout.axis
    return restore(out), _reversed_lengths(x, segments, axis=axis, devices=devices)

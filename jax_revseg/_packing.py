"""From segments laid end to end to one row a segment, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_revseg import _compat, _layout
from jax_revseg._layout import Integers
from jax_revseg._lowering import clip_lengths, packed_ends


def pack_segments(
    x: ArrayLike,
    lengths: Integers,
    *,
    max_length: int,
    padding_value: ArrayLike = 0,
) -> jax.Array:
    """Gives each segment of a concatenated array a row of its own.

    A segment longer than `max_length` keeps its first `max_length` steps; what a
    shorter one leaves of its row is `padding_value`. What follows the last segment is
    dropped. Lengths on a device are cut: a negative one counts as 0, and none passes
    the end of `x`.

    Args:
        x: Array of shape `(S, ...)` and any dtype: the segments, end to end.
        lengths: Integers of shape `(N,)`, in steps; `sum(lengths) <= S`.
        max_length: Size of the segment axis of the result, an int.
        padding_value: Scalar that fills the padding.

    Returns:
        Array of shape `(N, max_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or `padding_value` does not fit the
            dtype of `x`.
        ValueError: `lengths` does not have rank 1, `max_length` is negative, or lengths
            from the host are negative or sum to more than `S`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import pack_segments
        >>> pack_segments(jnp.array([1, 2, 3, 4, 5]), [2, 3], max_length=4)
        Array([[1, 2, 0, 0],
               [3, 4, 5, 0]], dtype=int32)

    Source: Caffe2's `PackSegments`.
    """
    name = "pack_segments"
    x = _layout.as_array(name, x)
    max_length = _layout.as_size(name, "max_length", max_length)
    values = _layout.as_integers(name, "lengths", lengths)
    _layout.check_rank_one(name, values)
    values = _layout.packed(name, x, values, 0, (), 1).values
    value = _layout.as_padding_value(name, x.dtype, padding_value)
    if x.shape[0] == 0:
        return jnp.full((values.shape[0], max_length, *x.shape[1:]), value)
    end = packed_ends(values, x.shape[0])[:, None]
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    index = start + jnp.arange(max_length, dtype=end.dtype)
    valid = (index < end).reshape(*index.shape, *[1] * (x.ndim - 1))
    return jnp.where(valid, jnp.take(x, index, 0, mode="clip"), value)


def unpack_segments(x: ArrayLike, lengths: Integers, *, total_length: int) -> jax.Array:
    """Lays the valid steps of each row end to end: the inverse of `pack_segments`.

    Row `n` gives its first `lengths[n]` steps, or as many as it has. Positions that are
    left at the end are zero; steps past the end are dropped. A negative length on a
    device counts as 0.

    Args:
        x: Array of shape `(N, L, ...)` and any numeric dtype, one segment a row.
        lengths: Integers of shape `(N,)`, in steps.
        total_length: Size of the first axis of the result, an int.

    Returns:
        Array of shape `(total_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or the dtype of `x` has no zero.
        ValueError: `x` has no axis for the steps, `lengths` does not have shape `(N,)`,
            `total_length` is negative, or lengths from the host are negative or need
            more than `total_length` steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import unpack_segments
        >>> unpack_segments(jnp.array([[1, 2, 0], [3, 4, 5]]), [2, 3], total_length=6)
        Array([1, 2, 3, 4, 5, 0], dtype=int32)

    Source: Caffe2's `UnpackSegments`.
    """
    name = "unpack_segments"
    x = _layout.as_array(name, x)
    total_length = _layout.as_size(name, "total_length", total_length)
    values = _layout.as_integers(name, "lengths", lengths)
    _layout.check_rank_one(name, values)
    values = _layout.unpacked(name, x, values, total_length)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name}: x has dtype {x.dtype}, which has no zero for the tail; unpack "
            "jax.random.key_data(x) instead."
        )
    zero = jnp.zeros((), x.dtype)
    if 0 in x.shape[:2]:
        return jnp.full((total_length, *x.shape[2:]), zero)
    end = packed_ends(clip_lengths(values, x.shape[1]), total_length)
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    t = jnp.arange(total_length, dtype=end.dtype)
    t = _compat.pvary(t, _compat.varying(jax.typeof(end)))  # searchsorted needs it.
    row = jnp.searchsorted(end, t, side="right")
    row = jnp.minimum(row, x.shape[0] - 1)
    valid = (t < end[-1]).reshape(-1, *[1] * (x.ndim - 2))
    out = x.at[row, t - start[row]].get(mode="clip")
    return jnp.where(valid, out, zero)

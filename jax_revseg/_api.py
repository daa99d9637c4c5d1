"""The public reversals: arguments in, one bind out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_revseg import _compat, _layout
from jax_revseg._layout import BatchAxis, Segments
from jax_revseg._lowering import align, packed_ends, padding_mask
from jax_revseg._primitive import reverse_segments_p


@partial(jax.jit, static_argnames=("axis", "batch_axes", "layout", "padding_id"))
def _bind_compiled(x, segments, **params):
    return reverse_segments_p.bind(x, segments, **params)


def _bind(x: jax.Array, segments: Segments) -> jax.Array:
    values, axis, batch_axes, layout, padding_id = segments
    params = dict(
        axis=axis, batch_axes=batch_axes, layout=layout, padding_id=padding_id
    )
    if not _compat.staged(x, values):
        return _bind_compiled(x, values, **params)  # Half the time of an eager bind.
    # Inside shard_map the result differs between devices wherever the segments do. If
    # `x` did not say so, the transpose would not know that it must sum over them.
    missing = _compat.varying(jax.typeof(values)) - _compat.varying(jax.typeof(x))
    x = _compat.pvary(x, missing)
    return reverse_segments_p.bind(x, values, **params)


def _check_padding_value(name: str, dtype: DTypeLike, value: Any) -> jax.Array:
    """The value in the dtype of x, if that can hold it."""
    shape = np.shape(value)
    if shape != ():
        raise ValueError(
            f"{name}: padding_value has shape {shape}, but must be a scalar (shape ()); "
            "use jax.numpy.where for anything else."
        )
    if isinstance(value, np.generic):
        value = value.item()  # Only the value counts, as it does for a Python scalar.
    try:
        fits = jnp.result_type(dtype, value) == dtype
        if fits and jnp.issubdtype(dtype, jnp.integer) and isinstance(value, int):
            fits = jnp.iinfo(dtype).min <= value <= jnp.iinfo(dtype).max
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise TypeError(
            f"{name}: padding_value is {value!r}, which x with dtype {dtype} cannot "
            f"hold; use a scalar of dtype {dtype}, or convert x first."
        )
    return jnp.asarray(value, dtype)


def _reverse(
    name: str, x: jax.Array, segments: Segments, padding_value: Any
) -> jax.Array:
    if padding_value is None:
        return _bind(x, segments)
    value = _check_padding_value(name, x.dtype, padding_value)
    out = _bind(x, segments)
    values, axis, batch_axes, layout, padding_id = segments
    if layout == "ids" and padding_id is None:
        return out  # No position is padding.
    mask = padding_mask(values, x.shape[axis], layout, padding_id)
    return jnp.where(align(mask, x.ndim, axis, batch_axes), value, out)


def reverse_sequence(
    x: ArrayLike,
    lengths: ArrayLike,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
) -> jax.Array:
    name = "reverse_sequence"
    x = _layout.as_array(name, x)
    segments = _layout.padded(name, x, lengths, axis, batch_axis)
    return _reverse(name, x, segments, padding_value)


def reverse_segments(
    x: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    padding_id: int | None = None,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    padding_value: ArrayLike | None = None,
) -> jax.Array:
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
    if segment_ids is not None:
        segments = _layout.ids(name, x, segment_ids, padding_id, axis, batch_axis)
    elif cu_seqlens is not None:
        segments = _layout.offsets(name, x, cu_seqlens, axis, batch_axis)
    else:
        segments = _layout.packed(name, x, lengths, axis, batch_axis)
    return _reverse(name, x, segments, padding_value)


def reverse_segment_order(
    x: ArrayLike,
    lengths: ArrayLike,
    *,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
) -> tuple[jax.Array, jax.Array]:
    name = "reverse_segment_order"
    x = _layout.as_array(name, x)
    segments = _layout.packed(name, x, lengths, axis, batch_axis)
    values, axis, batch_axes, *_ = segments
    ends = packed_ends(values, x.shape[axis])
    # Reversing all that is valid puts the segments in the opposite order, each of them
    # reversed; reversing each one puts its content right again.
    whole = Segments(ends[..., -1], axis, batch_axes, "padded")
    starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], -1)
    flipped = jnp.flip(ends - starts, -1)
    out = _bind(_bind(x, whole), segments._replace(values=flipped))
    return out, flipped.astype(values.dtype)

"""From segments laid end to end to one row a segment, and back: each the transpose.

    pack_segments[size=L unpack=False batch=0]    (S, ...) -> (N, L, ...)
    pack_segments[size=S unpack=True  batch=0]    (N, L, ...) -> (S, ...)

Both directions are one primitive. Segment n covers `[start, end)` of the flat axis, by
the cumulative lengths; its row holds the first L of these steps. All else is zero.
`batch` counts the leading axes that `vmap` has added to both operands.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_revseg import _compat
from jax_revseg._arguments import Call, Integers, split_constant
from jax_revseg._compat import batching, mlir
from jax_revseg._linear import compiled, linear_primitive, lower
from jax_revseg._lowering import (
    packed_ends,
    saturate,
    segment_numbers,
    starts_of,
    to_bits,
)
from jax_revseg._primitive import length_error
from jax_revseg._segments import parse_segments


def pack_segments(
    x: ArrayLike,
    lengths: Integers,
    *,
    max_length: int | None = None,
    padding_value: ArrayLike = 0,
) -> jax.Array:
    """Gives each segment of a concatenated array a row of its own.

    A segment longer than `max_length` keeps its first `max_length` steps. Steps after
    the last segment are dropped. In JAX arrays a negative length counts as 0, and
    segments end at the end of `x`; under `jax.experimental.checkify` both raise. The
    gradient is `unpack_segments` of the gradient, without a scatter.

    Args:
        x: Array of shape `(S, ...)` and any dtype: the segments, end to end.
        lengths: Integers of shape `(N,)`, in steps; `sum(lengths) <= S`.
        max_length: Size of the segment axis of the result, an int. The default is the
            largest length, for lengths on the host.
        padding_value: Scalar that fills the padding.

    Returns:
        Array of shape `(N, max_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or the dtype of `x` cannot hold
            `padding_value`.
        ValueError: `lengths` does not have rank 1, `max_length` is negative, or is left
            out for lengths in a JAX array, or host lengths are negative or sum to more
            than `S`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import pack_segments
        >>> pack_segments(jnp.array([1, 2, 3, 4, 5]), [2, 3], max_length=4)
        Array([[1, 2, 0, 0],
               [3, 4, 5, 0]], dtype=int32)

    Source: Caffe2's `PackSegments`.
    """
    call = Call("pack_segments")
    x = call.array(x)
    values = _rank_one(call, lengths)
    values, _ = parse_segments(call, x, 0, (), lengths_kind="packed", lengths=values)
    max_length = _size_or(call, "max_length", max_length, values, np.max)
    value = call.scalar(padding_value, x.dtype)
    constant, value = split_constant(value)
    rows = _bind(x, values, size=max_length, unpack=False)
    if constant is not None and not any(constant.bits):  # The padding is zero already.
        return rows
    return compiled(_fill, constant)(rows, x, values, value)


def unpack_segments(
    x: ArrayLike, lengths: Integers, *, total_length: int | None = None
) -> jax.Array:
    """Concatenates the valid steps of each row: the inverse of `pack_segments`.

    Row `n` gives its first `lengths[n]` steps, or as many as it has. Positions that
    remain at the end are zero; steps past the end are dropped. In JAX arrays a negative
    length counts as 0; under `jax.experimental.checkify` negative lengths, and valid
    steps past the end, raise. The gradient is `pack_segments` of the gradient, without
    a scatter.

    Args:
        x: Array of shape `(N, L, ...)` and any numeric dtype, one segment a row.
        lengths: Integers of shape `(N,)`, in steps.
        total_length: Size of the first axis of the result, an int. The default is the
            number of valid steps, for lengths on the host.

    Returns:
        Array of shape `(total_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or the dtype of `x` has no zero.
        ValueError: `x` has no axis for the steps, `lengths` does not have shape `(N,)`,
            `total_length` is negative, or is left out for lengths in a JAX array, or
            host lengths are negative or need more than `total_length` steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import unpack_segments
        >>> unpack_segments(jnp.array([[1, 2, 0], [3, 4, 5]]), [2, 3], total_length=6)
        Array([1, 2, 3, 4, 5, 0], dtype=int32)

    Source: Caffe2's `UnpackSegments`.
    """
    call = Call("unpack_segments")
    x = call.array(x)
    values = _rank_one(call, lengths)
    if x.ndim < 2 or values.shape != x.shape[:1]:
        call.fail(
            f"lengths has shape {values.shape} and x has shape {x.shape}; x needs axes "
            "for rows and steps, and lengths one entry for each row."
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.extended) or x.dtype == "float8_e8m0fnu":
        call.fail(
            f"x has dtype {x.dtype}, which has no zero for the tail; unpack other "
            "numbers, such as jax.random.key_data(x) or x.view('uint8').",
            TypeError,
        )
    if isinstance(values, np.ndarray):
        values = _cut_host_lengths(call, values, x.shape[1])
    total_length = _size_or(call, "total_length", total_length, values, np.sum)
    if isinstance(values, np.ndarray) and isinstance(total_length, int):
        if isinstance(x.shape[1], int) and (total := int(values.sum())) > total_length:
            call.fail(
                f"the valid steps number {total}, but total_length is {total_length}; "
                f"make it {total} or more."
            )
    # A row gives as many steps as it has; negative lengths remain, for checkify.
    values = compiled(_saturate)(x, values)
    return _bind(x, values, size=total_length, unpack=True)


def _rank_one(call: Call, lengths: Any) -> Any:
    values = call.integers("lengths", lengths)
    if values.ndim != 1:
        call.fail(
            f"lengths has rank {values.ndim} (shape {values.shape}), but must have "
            "rank 1, one length for each segment; use jax.vmap over batches."
        )
    return values


def _size_or(call: Call, argument: str, given: Any, lengths: Any, default: Any) -> Any:
    if given is not None:
        return call.size(argument, given)
    if isinstance(lengths, jax.Array):
        call.fail(
            f"{argument} is left out, but the lengths are in a JAX array, so their "
            f"values are not known here; give {argument}, an int."
        )
    return int(default(lengths.astype(np.int64), initial=0))


def _cut_host_lengths(call: Call, lengths: np.ndarray, limit: Any) -> np.ndarray:
    for n in np.flatnonzero(lengths < 0)[:1]:
        call.fail(
            f"lengths[{n}] is {lengths[n]}, but must not be negative; correct it."
        )
    limit = limit if isinstance(limit, int) else 2**31 - 1
    return np.minimum(lengths, min(limit, 2**31 - 1)).astype(np.int32)


def _fill(constant, rows, x, lengths, value):
    if 0 in rows.shape:  # For an empty array, `where` returns the value's type.
        return rows
    ends = packed_ends(lengths, x.shape[0])
    counts = (ends - starts_of(ends))[:, None]
    i = lax.broadcasted_iota(ends.dtype, rows.shape[:2], 1)
    padding = lax.expand_dims(i >= counts, range(2, rows.ndim))
    return jnp.where(padding, constant.array() if constant else value, rows)


def _saturate(x, lengths):
    return saturate(lengths, x.shape[1])


def _bind(x, lengths, *, size, unpack, batch=0):
    x = _compat.vary_like(x, lengths)
    return pack_segments_p.bind(x, lengths, size=size, unpack=unpack, batch=batch)


def _pack_rows(x, lengths, size):
    ends = packed_ends(lengths, x.shape[0]).astype(jnp.uint32)
    starts = starts_of(ends)
    i = lax.broadcasted_iota(jnp.uint32, (lengths.shape[0], size), 1)
    valid = i < (ends - starts)[:, None]
    return valid, (jnp.where(valid, starts[:, None] + i, 0),)


def _unpack_rows(x, lengths, size):
    rows, limit = x.shape[:2]
    ends = packed_ends(lengths, size)
    row = segment_numbers(ends, size)
    inside, row = row < rows, jnp.minimum(row, rows - 1)
    step = lax.iota(ends.dtype, size) - starts_of(ends)[row]
    valid = inside & (step < limit)
    return valid, (row, jnp.where(valid, step, 0))


def _move(x, lengths, *, size, unpack):
    """One gather, and zeros elsewhere; bits move unchanged."""
    features = x.shape[2 if unpack else 1 :]
    out_shape = (size, *features) if unpack else (lengths.shape[0], size, *features)
    bits = to_bits(x)
    if 0 in x.shape or 0 in out_shape:
        out = lax.full_like(bits, 0, shape=out_shape)
    else:
        valid, index = (_unpack_rows if unpack else _pack_rows)(bits, lengths, size)
        out = bits.at[index].get(mode="promise_in_bounds")
        if not jnp.issubdtype(x.dtype, jax.dtypes.extended):  # Keys have no zero.
            valid = lax.expand_dims(valid, range(valid.ndim, out.ndim))
            out = jnp.where(valid, out, jnp.zeros((), out.dtype))
    return out if bits is x else lax.bitcast_convert_type(out, x.dtype)


def _pack_segments_abstract_eval(x, lengths, *, size, unpack, batch):
    features = batch + (2 if unpack else 1)
    shape = (size,) if unpack else (lengths.shape[batch], size)
    spec, lengths_spec = x.sharding.spec, lengths.sharding.spec
    for what, axes, names in (
        ("x", range(batch, features), spec),
        ("the lengths", [batch], lengths_spec),
    ):
        for a in axes:
            if names[a] is not None:
                raise ValueError(
                    f"{'un' * unpack}pack_segments: axis {a} of {what} is sharded over "
                    f"mesh axis {names[a]!r}, but rows and steps change places here; "
                    "replicate that axis with jax.sharding.reshard first."
                )
    rows = [a or b for a, b in zip(spec[:batch], lengths_spec[:batch], strict=True)]
    spec = PartitionSpec(*rows, *[None] * len(shape), *spec[features:])
    mesh = (lengths if x.sharding.mesh.empty else x).sharding.mesh
    return x.update(
        shape=(*x.shape[:batch], *shape, *x.shape[features:]),
        sharding=NamedSharding(mesh, spec),
    )


def _pack_segments_transpose(ct, x, lengths, *, size, unpack, batch):
    del size
    size = x.shape[batch + 1 if unpack else batch]
    return pack_segments_p.bind(ct, lengths, size=size, unpack=not unpack, batch=batch)


def _pack_segments_batching(axis_data, operands, dims, *, size, unpack, batch):
    (x, lengths), (x_dim, lengths_dim) = operands, dims
    bind = partial(_bind, size=size, unpack=unpack)
    if lengths_dim is not None:
        if x_dim is None:
            mesh_axis = axis_data.explicit_mesh_axis
            x = batching.broadcast(x, axis_data.size, 0, mesh_axis=mesh_axis)
            x_dim = 0
        x, lengths = jnp.moveaxis(x, x_dim, 0), jnp.moveaxis(lengths, lengths_dim, 0)
        return bind(x, lengths, batch=batch + 1), 0
    if x_dim is None:  # JAX calls with nothing mapped, too.
        return bind(x, lengths, batch=batch), None
    # An axis of x alone is one more feature axis.
    features, out_features = batch + 1 + unpack, batch + 2 - unpack
    if x_dim < features:
        x, x_dim = jnp.moveaxis(x, x_dim, features), features
    return bind(x, lengths, batch=batch), x_dim - features + out_features


def _pack_segments_checkify(x, lengths, *, size, unpack, batch):
    name, limit = "pack_segments", "the size of axis 0 of x"
    if unpack:
        name, limit = "unpack_segments", "total_length"
    return length_error(name, lengths, size if unpack else x.shape[batch], limit)


def _pack_segments_lowering(ctx, x, lengths, *, size, unpack, batch):
    fun = partial(_move, size=size, unpack=unpack)
    fun = reduce(lambda fun, _: jax.vmap(fun), range(batch), fun)
    return lower(fun, ctx, x, lengths)


pack_segments_p = linear_primitive(
    "pack_segments",
    abstract_eval=_pack_segments_abstract_eval,
    transpose=_pack_segments_transpose,
    check=_pack_segments_checkify,
)
batching.fancy_primitive_batchers[pack_segments_p] = _pack_segments_batching
mlir.register_lowering(pack_segments_p, _pack_segments_lowering)

"""The primitive `pack_segments`, in both directions: each is the other's transpose.

    pack_segments[size=L unpack=False batch=0]    (S, ...) -> (N, L, ...)
    pack_segments[size=S unpack=True  batch=0]    (N, L, ...) -> (S, ...)

Segment n covers `[start, end)` of the flat axis, by the cumulative lengths; its row
holds the first L of these steps. All else is zero. `batch` counts the leading axes that
`vmap` has added to both operands.
"""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_revseg import _compat
from jax_revseg._boundaries import around_bits, take_last
from jax_revseg._compat import mlir
from jax_revseg._linear import linear_primitive, lower
from jax_revseg._lowering import packed_ends, start_words, starts_of, to_bits
from jax_revseg._primitive import length_error


def bind(x, lengths, *, size, unpack, batch=0):
    """Binds the primitive; `x` varies over devices wherever `lengths` does."""
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
    ends = packed_ends(lengths, size).astype(jnp.uint32)
    starts, t = starts_of(ends), lax.iota(jnp.uint32, size)
    before, _ = around_bits(start_words(starts, ends, size))
    # Of segments that start at one position only the last is not empty.
    row = jnp.zeros_like(t, jnp.int32).at[starts].max(lax.iota(jnp.int32, rows))
    step = t - before[:size]
    valid = (t < ends[-1]) & (step < limit)
    return valid, (take_last(row, before[:size]), jnp.where(valid, step, 0))


def _move(x, lengths, *, size, unpack):
    """One gather, and zeros elsewhere; bits move unchanged."""
    shape = (size,) if unpack else (lengths.shape[0], size)
    shape, bits = (*shape, *x.shape[1 + unpack :]), to_bits(x)
    if 0 in x.shape or 0 in shape:
        out = lax.full_like(bits, 0, shape=shape)
    else:
        valid, index = (_unpack_rows if unpack else _pack_rows)(bits, lengths, size)
        out = bits.at[index].get(mode="promise_in_bounds")
        if not jnp.issubdtype(x.dtype, jax.dtypes.extended):  # Keys have no zero.
            valid = lax.expand_dims(valid, range(valid.ndim, out.ndim))
            out = jnp.where(valid, out, jnp.zeros((), out.dtype))
    return out if bits is x else lax.bitcast_convert_type(out, x.dtype)


def _pack_segments_abstract_eval(x, lengths, *, size, unpack, batch):
    features = batch + 1 + unpack
    shape = (size,) if unpack else (lengths.shape[batch], size)
    spec, lengths_spec = x.sharding.spec, lengths.sharding.spec
    moved = [("x", a, spec[a]) for a in range(batch, features)]
    for what, a, name in (*moved, ("the lengths", batch, lengths_spec[batch])):
        if name is not None:
            what = f"{'un' * unpack}pack_segments: axis {a} of {what} is sharded over"
            why = f"mesh axis {name!r}, but rows and steps change places here"
            raise ValueError(f"{what} {why}; replicate it with jax.sharding.reshard.")
    rows = [a or b for a, b in zip(spec[:batch], lengths_spec[:batch], strict=True)]
    spec = PartitionSpec(*rows, *[None] * len(shape), *spec[features:])
    mesh = (lengths if x.sharding.mesh.empty else x).sharding.mesh
    return x.update(
        shape=(*x.shape[:batch], *shape, *x.shape[features:]),
        sharding=NamedSharding(mesh, spec),
    )


def _pack_segments_transpose(ct, x, lengths, *, size, unpack, batch):
    size = x.shape[batch + unpack]  # The transpose goes the other way.
    return pack_segments_p.bind(ct, lengths, size=size, unpack=not unpack, batch=batch)


def _pack_segments_batch(x, x_dim, lengths, lengths_dim, *, size, unpack, batch):
    pack = partial(bind, size=size, unpack=unpack)
    if lengths_dim is not None:
        x, lengths = jnp.moveaxis(x, x_dim, 0), jnp.moveaxis(lengths, lengths_dim, 0)
        return pack(x, lengths, batch=batch + 1), 0
    # An axis of x alone becomes the first feature axis.
    x = jnp.moveaxis(x, x_dim, batch + 1 + unpack)
    return pack(x, lengths, batch=batch), batch + 2 - unpack


def _pack_segments_checkify(x, lengths, *, size, unpack, batch):
    size, limit = size if unpack else x.shape[batch], "the size of axis 0 of x"
    limit = "total_length" if unpack else limit
    return length_error(f"{'un' * unpack}pack_segments", lengths, size, limit)


def _pack_segments_lowering(ctx, x, lengths, *, size, unpack, batch):
    fun = partial(_move, size=size, unpack=unpack)
    fun = reduce(lambda fun, _: jax.vmap(fun), range(batch), fun)
    return lower(fun, ctx, x, lengths)


pack_segments_p = linear_primitive(
    "pack_segments",
    abstract_eval=_pack_segments_abstract_eval,
    transpose=_pack_segments_transpose,
    batch=_pack_segments_batch,
    check=_pack_segments_checkify,
)
mlir.register_lowering(pack_segments_p, _pack_segments_lowering)

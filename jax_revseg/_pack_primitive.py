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
from jax_revseg._boundaries import take_last
from jax_revseg._compat import mlir
from jax_revseg._linear import linear_primitive, lower
from jax_revseg._lowering import packed_ends, starts_of, to_bits
from jax_revseg._primitive import length_error


def bind(x, lengths, *, size, unpack, batch=0):
    """Binds the primitive; `x` varies over devices wherever `lengths` does."""
    x = _compat.vary_like(x, lengths)
    return pack_segments_p.bind(x, lengths, size=size, unpack=unpack, batch=batch)


def _count_up_to(values: jax.Array, limits: jax.Array) -> jax.Array:
    """For each limit, the number of ascending `values` that are at most the limit.

    A binary search, because `jnp.searchsorted` refuses a symbolic size.
    """
    count = values.shape[0]
    rounds = count.bit_length() if isinstance(count, int) else 31

    def search(i, found):
        i = jnp.asarray(i, jnp.int32)  # JAX 0.7 gives an int in disable_jit.
        step = jnp.left_shift(jnp.int32(1), rounds - 1 - i)
        # Compared this way round the sum cannot wrap.
        fits = step <= count - found
        value = take_last(values, jnp.where(fits, found + step - 1, 0))
        return jnp.where(fits & (value <= limits), found + step, found)

    found = _compat.vary_like(jnp.zeros_like(limits, jnp.int32), values)
    return lax.fori_loop(0, rounds, search, found)


def _segment_numbers(starts: jax.Array, ends: jax.Array, size: int) -> jax.Array:
    """For each position before the last end, the number of its segment.

    A search for each position would take ten times as long. Here a word of 32 bits
    marks the starts of 32 positions, there is one search for each word, and a position
    counts the bits up to its own.
    """
    full = (starts < ends).astype(jnp.uint32)
    words = (size + 31) // 32
    limits = 32 * lax.iota(jnp.uint32, words + 1)
    before = _count_up_to(starts + 1, limits)

    def sums(values):  # Over the segments that start before each word.
        values = lax.pad(lax.cumsum(values), jnp.uint32(0), [(1, 0, 0)])
        return take_last(values, before)

    # Different segments set different bits, so a difference of sums has these bits.
    marks, ranks = sums(full << (starts & 31)), sums(full)
    marks, ranks = (marks[1:] - marks[:-1])[:, None], ranks[:-1, None]
    bit = lax.broadcasted_iota(jnp.uint32, (words, 32), 1)
    found = ranks + lax.population_count(marks & ((jnp.uint32(2) << bit) - 1)) - 1
    # The number of the k-th segment that is not empty.
    numbers = _count_up_to(lax.cumsum(full), lax.iota(jnp.uint32, full.shape[0]))
    return take_last(numbers, found.reshape(32 * words)[:size])


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
    row = jnp.minimum(_segment_numbers(starts, ends, size), rows - 1)
    step = t - take_last(starts, row)
    valid = (t < ends[-1]) & (step < limit)
    return valid, (row, jnp.where(valid, step, 0))


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

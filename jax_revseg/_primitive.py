"""The primitive `reverse_segments` and its rules; the registrations stand last.

    reverse_segments[layout=Layout(kind='padded', axis=1, ...)] x segments

`segments` has the shape `[x.shape[a] for a in layout.batch_axes]`, followed by nothing
for padded lengths, `(K,)` for packed lengths and `(T,)` for ids and starts. The
parameter is stable, for interpreters and exporters of jaxprs; bind through the public
functions.

The map is a permutation and its own inverse, hence linear and its own transpose.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_revseg import _compat
from jax_revseg._compat import mlir
from jax_revseg._linear import linear_primitive, lower
from jax_revseg._lowering import packed_sums, reverse_gather

_LOOPS = ("scan_segments", "bidirectional_scan")  # They have no axis_name.


def bind(x, segments, layout):
    """Binds the primitive; `x` varies over devices wherever `segments` does."""
    # Otherwise the transpose would not sum the cotangents of a replicated x.
    x = _compat.vary_like(x, segments)
    return reverse_segments_p.bind(x, segments, layout=layout)


def merged_spec(x, segments, layout):
    """Merges both operands' shardings, as a binary operation does, or raises."""
    spec = list(x.sharding.spec)
    name = spec[layout.axis]
    if name is not None:
        remedy = "replicate that axis with jax.sharding.reshard"
        if layout.kind != "mask" and layout.function not in _LOOPS:
            remedy += f", or call inside jax.shard_map, with axis_name={name!r}"
        raise ValueError(
            f"{layout.function}: axis {layout.axis} of x, the segment axis, is sharded "
            f"over mesh axis {name!r}; {remedy}."
        )
    for i, name in enumerate(segments.sharding.spec):
        if name is None:
            continue
        but = "it runs along the segment axis, which cannot be sharded"
        if i < len(layout.batch_axes):
            a = layout.batch_axes[i]
            but = f"x, whose axis {a} goes with it, is sharded as {tuple(spec)}"
            taken = set(jax.tree.leaves(spec)) & set(jax.tree.leaves(name))
            if spec[a] is None and not taken:
                spec[a] = name
            if spec[a] == name:
                continue
        raise ValueError(
            f"{layout.function}: axis {i} of the lengths or ids is sharded over mesh "
            f"axis {name!r}, but {but}. Give both the same sharding with "
            "jax.sharding.reshard."
        )
    return tuple(spec)


def _reverse_segments_abstract_eval(x, segments, *, layout):
    spec = merged_spec(x, segments, layout)
    if spec == tuple(x.sharding.spec):
        return x.update()
    mesh = (segments if x.sharding.mesh.empty else x).sharding.mesh
    return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _reverse_segments_transpose(ct, x, segments, **params):
    return reverse_segments_p.bind(ct, segments, **params)


def _reverse_segments_batch(x, x_dim, segments, segments_dim, *, layout):
    if segments_dim is not None and segments_dim > len(layout.batch_axes):
        segments = jnp.moveaxis(segments, segments_dim, 0)  # Not behind K or T.
        segments_dim = 0
    return bind(x, segments, layout.mapped(x_dim, segments_dim)), x_dim


def length_error(name, lengths, size, limit, *, packed=True):
    """Returns whether a length is out of range, and the message with its values."""
    if 0 in lengths.shape:
        return jnp.bool_(False), "", {}

    def first_bad(lengths):
        # An int8 length cannot pass 300, and 300 cannot be compared with an int8.
        bad = (lengths < 0) | (lengths > min(size, jnp.iinfo(lengths.dtype).max))
        if packed:  # Each within the size, but not their sum.
            bad |= packed_sums(lengths, size) > size
        first = jnp.argmax(bad.ravel())
        row = jnp.unravel_index(first, bad.shape)
        return jnp.any(bad), lengths.ravel()[first], *row

    # Under explicit sharding every device must get the answer.
    everywhere = NamedSharding(jax.typeof(lengths).sharding.mesh, PartitionSpec())
    failed, value, *row = _compat.automatic(first_bad, everywhere)(lengths)
    values = {f"i{n}": index for n, index in enumerate(row)}
    where = f"[{', '.join(f'{{{n}}}' for n in values)}]" if values else ""
    rule = "must lie between 0 and"
    if packed:
        rule = "must not be negative (nor cu_seqlens decrease), nor sum to more than"
    message = f"{name}: lengths{where} is {{value}}, but {rule} {size}, {limit}."
    return failed, message, {"value": value, **values}


def _reverse_segments_checkify(x, segments, *, layout):
    if layout.per_step:  # No id is out of range.
        return jnp.bool_(False), "", {}
    size, limit = x.shape[layout.axis], "the size of the segment axis"
    packed = layout.kind == "packed"
    return length_error(layout.function, segments, size, limit, packed=packed)


# One function in the module for any number of calls with these shapes.
_reverse_gather = jax.jit(reverse_gather, static_argnames=("layout", "windows"))


def _reverse_segments_lowering(ctx, x, segments, *, layout, windows=False):
    fun = partial(_reverse_gather, layout=layout, windows=windows)
    return lower(fun, ctx, x, segments)


reverse_segments_p = linear_primitive(
    "reverse_segments",
    abstract_eval=_reverse_segments_abstract_eval,
    transpose=_reverse_segments_transpose,
    batch=_reverse_segments_batch,
    check=_reverse_segments_checkify,
)
mlir.register_lowering(reverse_segments_p, _reverse_segments_lowering)
for _platform in ("cpu", "tpu"):  # They read single elements slowly.
    mlir.register_lowering(
        reverse_segments_p,
        partial(_reverse_segments_lowering, windows=True),
        platform=_platform,
    )

"""ONNX export: importing this module registers the primitives with jax2onnx.

    import jax_revseg.onnx
    jax2onnx.to_onnx(f, inputs, return_mode="file", output_path="model.onnx")

One length a row becomes one `ReverseSequence` node. Everything else becomes one gather
by an index that compares all positions with all boundaries, so the index of a row takes
memory in proportion to T * K for packed lengths and T * T for ids.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_revseg._compat import Primitive
from jax_revseg._layout import Layout
from jax_revseg._lowering import clip_lengths, packed_ends, starts_of
from jax_revseg._pack_primitive import pack_segments_p
from jax_revseg._primitive import reverse_segments_p

# pyright: reportMissingImports=false
try:
    import onnx_ir as ir
    from jax2onnx.plugins.jax.lax._control_flow_utils import lower_jaxpr_eqns
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive
except ImportError as error:
    raise ImportError(
        "jax_revseg.onnx needs jax2onnx 0.17 or newer, which this package's extra "
        "`onnx` installs: from a clone, pip install '.[onnx]'."
    ) from error

# An equation that becomes exactly one node.
_reverse_sequence_p = Primitive("jax_revseg_reverse_sequence")
_reverse_sequence_p.def_abstract_eval(lambda x, lengths: x.update())


def _inline(ctx: Any, eqn: Any, fun: Any, symbolic: bool = False) -> None:
    """Lowers the equations of `fun` in place of `eqn`."""
    [outer] = eqn.outvars
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    sizes = [n for aval in avals for n in aval.shape]
    if outer.aval == eqn.invars[0].aval and 0 in sizes:  # A reversal of nothing.
        ctx.bind_value_for_var(outer, ctx.get_value_for_var(eqn.invars[0]))
        return
    if not symbolic and not all(isinstance(n, int) for n in sizes):
        what = f"{eqn.primitive.name}: ONNX export needs shapes of integers, not"
        remedy = "export one model for each size, and pad the inputs"
        raise NotImplementedError(f"{what} {[a.shape for a in avals]}; {remedy}.")
    closed = jax.make_jaxpr(fun)(*avals)
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        ctx.bind_const_for_var(var, value)
    for given, inner in zip(eqn.invars, closed.jaxpr.invars, strict=True):
        ctx.bind_value_for_var(inner, ctx.get_value_for_var(given))
    lower_jaxpr_eqns(ctx, closed.jaxpr, source=eqn.primitive.name)
    [inner] = closed.jaxpr.outvars
    ctx.bind_value_for_var(outer, ctx.get_value_for_var(inner))


def _around(bounds: jax.Array, t: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """For each position, the last bound at or before it and the first one after it."""
    bounds, t = bounds[..., None, :], t[:, None]
    before = jnp.max(jnp.where(bounds <= t, bounds, 0), -1)
    return before, jnp.min(jnp.where(bounds > t, bounds, size), -1)


def _source_index(segments: jax.Array, size: int, layout: Layout) -> jax.Array:
    """For each row and position, the position to read: `(rows, size)`."""
    t, padding = lax.iota(jnp.int32, size), layout.padding_id
    if layout.per_step:
        starts = segments[:, 1:]
        if layout.kind == "ids":
            starts = starts != segments[:, :-1]
        bounds = jnp.where(starts, t[1:], 0)
        valid = padding is None or segments != jnp.asarray(padding, segments.dtype)
    else:
        bounds = packed_ends(segments.reshape(len(segments), -1), size)
        valid = t < bounds[:, -1:]
    start, end = _around(bounds, t, size)
    return jnp.where(valid, start + end - 1 - t, t)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Indexes axis 1 of x, row by row: one Gather node with a flat index."""
    rows = lax.iota(jnp.int32, x.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
    flat = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return jnp.take(flat, rows * x.shape[1] + index, axis=0, mode="clip")


def _reverse(x: jax.Array, segments: jax.Array, *, layout: Layout, node: bool) -> Any:
    batch, size = len(layout.batch_axes), x.shape[layout.axis]
    front = (*layout.batch_axes, layout.axis)
    order = (*front, *(a for a in range(x.ndim) if a not in front))
    moved = lax.transpose(x, order)
    rows = math.prod(segments.shape[:batch])
    flat = moved.reshape(rows, size, *moved.shape[batch + 1 :])
    segments = segments.reshape(rows, *segments.shape[batch:])
    if layout.kind == "padded" and node:
        out = _reverse_sequence_p.bind(flat, clip_lengths(segments, size))
    else:
        out = _take(flat, _source_index(segments, size, layout))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return lax.transpose(out.reshape(moved.shape), back)


@register_primitive(jaxpr_primitive=reverse_segments_p.name)
class _ReverseSegments(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        # ReverseSequence takes neither bfloat16 nor floats of 8 bits.
        layout, x = eqn.params["layout"], eqn.invars[0].aval
        node = x.dtype.kind in "biuf"
        # One batch axis may be symbolic where the node needs no reshape.
        symbolic = node and layout.kind == "padded" and len(layout.batch_axes) == 1
        symbolic &= isinstance(x.shape[layout.axis], int)
        _inline(ctx, eqn, partial(_reverse, layout=layout, node=node), symbolic)


@register_primitive(jaxpr_primitive=_reverse_sequence_p.name)
class _ReverseSequence(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        x, lengths = map(ctx.get_value_for_var, eqn.invars)
        int64, names = ir.DataType.INT64, [ctx.fresh_name("lengths")]
        lengths = ctx.builder.Cast(lengths, to=int64, _outputs=names)
        axes, names = dict(time_axis=1, batch_axis=0), [ctx.fresh_name("reversed")]
        out = ctx.builder.ReverseSequence(x, lengths, **axes, _outputs=names)
        lengths.type = ir.TensorType(int64)
        out.type, out.shape = x.type, x.shape
        ctx.bind_value_for_var(eqn.outvars[0], out)


def _pack(x: jax.Array, lengths: jax.Array, *, size: int, unpack: bool, batch: int):
    """Packs or unpacks by one gather."""
    features, rows, t = batch + 1 + unpack, lengths.shape[-1], lax.iota(jnp.int32, size)
    out_shape = (size,) if unpack else (rows, size)
    out_shape = (*x.shape[:batch], *out_shape, *x.shape[features:])
    if 0 in (*x.shape, *out_shape):
        return jnp.zeros(out_shape, x.dtype)
    steps, outer = math.prod(x.shape[batch:features]), math.prod(x.shape[:batch])
    ends = packed_ends(lengths.reshape(outer, rows), size if unpack else steps)
    if unpack:
        limit = x.shape[batch + 1]
        row = jnp.sum(ends[:, None] <= t[:, None], -1, dtype=jnp.int32)
        step = t - _around(ends, t, size)[0]
        valid, index = (row < rows) & (step < limit), row * limit + step
    else:
        starts = starts_of(ends)[..., None]
        valid, index = t < ends[..., None] - starts, starts + t
    # One step of zeros, because Where in ONNX Runtime turns -0.0 into 0.0.
    flat = x.reshape(outer, steps, *x.shape[features:])
    grow = [(0, a == 1, 0) for a in range(flat.ndim)]
    flat = lax.pad(flat, jnp.zeros((), x.dtype), grow)
    return _take(flat, jnp.where(valid, index, steps)).reshape(out_shape)


@register_primitive(jaxpr_primitive=pack_segments_p.name)
class _PackSegments(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        _inline(ctx, eqn, partial(_pack, **eqn.params))

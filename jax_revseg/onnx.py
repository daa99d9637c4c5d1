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
from jax_revseg._lowering import clip_lengths, starts_of
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
        raise NotImplementedError(
            f"{eqn.primitive.name}: ONNX export needs shapes of integers, but the "
            f"operands have shapes {[aval.shape for aval in avals]}; export one model "
            "for each size, and pad the inputs."
        )
    closed = jax.make_jaxpr(fun)(*avals)
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        ctx.bind_const_for_var(var, value)
    for given, inner in zip(eqn.invars, closed.jaxpr.invars, strict=True):
        ctx.bind_value_for_var(inner, ctx.get_value_for_var(given))
    lower_jaxpr_eqns(ctx, closed.jaxpr, source=eqn.primitive.name)
    [inner] = closed.jaxpr.outvars
    ctx.bind_value_for_var(outer, ctx.get_value_for_var(inner))


def _ends(lengths: jax.Array, size: int) -> jax.Array:
    ends = lax.cumsum(clip_lengths(lengths, size), lengths.ndim - 1)
    return jnp.minimum(ends, size)


def _around(bounds: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each position, the last bound at or before it, the first bound after it."""
    bounds, t = bounds[..., None, :], lax.iota(jnp.int32, size)[:, None]
    before = jnp.max(jnp.where(bounds <= t, bounds, 0), -1)
    return t[:, 0], before, jnp.min(jnp.where(bounds > t, bounds, size), -1)


def _source_index(segments: jax.Array, size: int, layout: Layout) -> jax.Array:
    """For each row and position, the position to read: `(rows, size)`."""
    if layout.per_step:
        u = lax.iota(jnp.int32, size)
        ends = segments[:, 1:]
        if layout.kind == "ids":
            ends = ends != segments[:, :-1]
        bounds = jnp.where(ends, u[1:], 0)
        valid = True
        if layout.padding_id is not None:
            valid = segments != jnp.asarray(layout.padding_id, segments.dtype)
    else:
        bounds = _ends(segments if segments.ndim == 2 else segments[:, None], size)
        valid = lax.iota(jnp.int32, size) < bounds[:, -1:]
    t, start, end = _around(bounds, size)
    return jnp.where(valid, start + end - 1 - t, t)


def _take(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Indexes axis 1 of x, row by row: one Gather node with a flat index."""
    rows = lax.iota(jnp.int32, x.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
    flat = x.reshape(x.shape[0] * size, *x.shape[2:])
    return jnp.take(flat, rows * size + index, axis=0, mode="clip")


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
        out = _take(flat, _source_index(segments, size, layout), size)
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
        lengths = ctx.builder.Cast(
            lengths, to=ir.DataType.INT64, _outputs=[ctx.fresh_name("lengths")]
        )
        out = ctx.builder.ReverseSequence(
            x,
            lengths,
            time_axis=1,
            batch_axis=0,
            _outputs=[ctx.fresh_name("reversed")],
        )
        lengths.type = ir.TensorType(ir.DataType.INT64)
        out.type, out.shape = x.type, x.shape
        ctx.bind_value_for_var(eqn.outvars[0], out)


def _pack(x: jax.Array, lengths: jax.Array, *, size: int, unpack: bool, batch: int):
    """Packs or unpacks by one gather."""
    total = size if unpack else x.shape[batch]
    out_shape = (size,) if unpack else (lengths.shape[-1], size)
    out_shape = (*x.shape[:batch], *out_shape, *x.shape[batch + 1 + unpack :])
    if 0 in (*x.shape, *out_shape):
        return jnp.zeros(out_shape, x.dtype)
    outer, rows = math.prod(x.shape[:batch]), lengths.shape[-1]
    ends = _ends(lengths.reshape(outer, rows), total)
    starts = starts_of(ends)
    if unpack:
        limit = x.shape[batch + 1]
        t = lax.iota(jnp.int32, size)
        row = jnp.sum(ends[:, None] <= t[:, None], -1, dtype=jnp.int32)
        step = t - _around(ends, size)[1]
        valid = (row < rows) & (step < limit)
        index, inner = row * limit + step, rows * limit
    else:
        t = lax.iota(jnp.int32, size)
        valid = t < (ends - starts)[..., None]
        index, inner = starts[..., None] + t, total
    # One step of zeros, because Where in ONNX Runtime turns -0.0 into 0.0.
    flat = x.reshape(outer, inner, *x.shape[batch + 1 + unpack :])
    flat = lax.pad(
        flat, jnp.zeros((), x.dtype), [(0, a == 1, 0) for a in range(flat.ndim)]
    )
    return _take(flat, jnp.where(valid, index, inner), inner + 1).reshape(out_shape)


@register_primitive(jaxpr_primitive=pack_segments_p.name)
class _PackSegments(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        _inline(ctx, eqn, partial(_pack, **eqn.params))

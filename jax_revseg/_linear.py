"""Primitives that are linear in `x` and fixed in `segments`: the rules they share.

A map that moves elements has no rounding, so each derivative rule is a bind of the map
itself, or of its transpose, on another operand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import getfullargspec
from typing import Any

import jax

from jax_revseg import _compat
from jax_revseg._compat import ad, batching, mlir


def compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles eager calls of `fun`, whose keyword-only arguments are static.

    While a program is traced, `fun` itself runs. jax2onnx replaces functions of `jnp`
    while it traces, and `jax.jit` would keep what it has traced then.
    """
    jitted = jax.jit(fun, static_argnames=getfullargspec(fun).kwonlyargs)

    @wraps(fun)
    def call(*args: Any, **static: Any) -> Any:
        return (fun if _compat.staged() else jitted)(*args, **static)

    return call


def _check_operands(name: str, x: Any, segments: Any) -> None:
    missing = _compat.varying(segments) - _compat.varying(x)
    if missing:
        # Without this check shard_map would take a result that differs between devices
        # for a replicated one, and gradients would lack a sum.
        raise ValueError(
            f"{name}_p: segments vary over manual mesh axes {set(missing)} and x does "
            "not; mark x with jax.lax.pcast(..., to='varying') first."
        )
    for what, operand in (("x", x), ("the lengths or ids", segments)):
        spec = operand.sharding.spec
        if spec.unreduced or spec.reduced:
            raise ValueError(
                f"{name}: {what} has sharding {spec}; partial sums (unreduced, "
                "reduced) are not supported: use jax.sharding.reshard to a sharding "
                "without them first."
            )


def linear_primitive(
    name: str,
    *,
    abstract_eval: Callable[..., Any],
    transpose: Callable[..., jax.Array],
    batch: Callable[..., tuple[jax.Array, int]],
    check: Callable[..., Any],
) -> _compat.Primitive:
    """Returns a primitive of `(x, segments)` with all rules but the lowering.

    Args:
        name: The name of the primitive in a jaxpr.
        abstract_eval: The type of the result; the varying axes are checked here.
        transpose: `transpose(ct, x_aval, segments, **params)`, one bind.
        batch: `batch(x, x_dim, segments, segments_dim, **params)` for a mapped x.
        check: The checkify rule: see `_compat.register_checkify_rule`.
    """
    primitive = _compat.Primitive(name)

    def checked_abstract_eval(x, segments, **params):
        _check_operands(name, x, segments)
        return abstract_eval(x, segments, **params)

    def jvp(tangent, x, segments, **params):
        return primitive.bind(tangent, segments, **params)

    def transpose_rule(ct, x, segments, **params):
        if type(ct) is ad.Zero:
            return [ad.Zero(x.aval), None]
        # The output may be sharded like the segments where x was not.
        ct_x = transpose(ct, x.aval, segments, **params)
        return [_compat.reshard_to(ct_x, x.aval.sharding), None]

    def batching_rule(axis_data, operands, dims, **params):
        (x, segments), (x_dim, segments_dim) = operands, dims
        if x_dim is None and segments_dim is None:  # JAX also calls it for nothing.
            return primitive.bind(x, segments, **params), None
        if x_dim is None:
            mesh_axis = axis_data.explicit_mesh_axis
            x = batching.broadcast(x, axis_data.size, 0, mesh_axis=mesh_axis)
            x_dim = 0
        return batch(x, x_dim, segments, segments_dim, **params)

    def jet(primals, series, **params):
        # `jet.deflinear` would bind the zero series of the segments in their place.
        bind = partial(primitive.bind, **params)
        x, segments = primals
        return bind(x, segments), [bind(term, segments) for term in series[0]]

    primitive.def_impl(partial(_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(checked_abstract_eval)
    ad.defjvp(primitive, jvp, None)
    ad.primitive_transposes[primitive] = transpose_rule
    batching.fancy_primitive_batchers[primitive] = batching_rule
    _compat.jet_rules[primitive] = jet
    _compat.register_checkify_rule(primitive, check)
    return primitive


def lower(fun: Callable[..., jax.Array], ctx: Any, x: Any, segments: Any) -> Any:
    """Lowers `fun(x, segments)` with only the sharding of its result fixed.

    Under explicit sharding JAX would otherwise check the index arithmetic as it checks
    a user's own operations.
    """
    fun = _compat.automatic(fun, ctx.avals_out[0].sharding)
    return mlir.lower_fun(fun, multiple_results=False)(ctx, x, segments)

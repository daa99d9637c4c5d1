"""Differences between JAX versions, and everything that JAX does not guarantee.

All imports from `jax.interpreters`, `jax._src` and `jax.experimental.jet` stand here,
and so do all branches on the version of JAX. Each branch names the first release that
no longer needs the branch: delete the branch when that release is the oldest supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax._src import checkify, core
from jax._src.interpreters.partial_eval import DynamicJaxprTrace
from jax.experimental.jet import jet_rules as jet_rules
from jax.interpreters import ad as ad, batching as batching, mlir as mlir
from jax.interpreters.xla import apply_primitive as apply_primitive
from jax.sharding import NamedSharding, auto_axes, reshard

# `jax.extend.core` has Primitive too, but imports Pallas from JAX 0.10 on, which would
# take most of the import time of this package.
Primitive = core.Primitive

JAX_VERSION = jax.__version_info__  # Numbers, also for a release candidate.


def varying(x: Any) -> frozenset[str]:
    """Returns the manual mesh axes over which an array or an aval varies."""
    aval: Any = x if isinstance(x, core.AbstractValue) else jax.typeof(x)
    # The older attribute is always empty there.
    if JAX_VERSION >= (0, 10):  # From 0.10.0 on.
        return frozenset(aval.mat.varying)
    return frozenset(aval.vma)


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks `x` as varying wherever `others` vary; the transpose sums over devices."""
    axes = frozenset().union(*map(varying, others)) - varying(x)
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # From 0.8.2 on.
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return jax.lax.pvary(x, tuple(axes))  # pyright: ignore


def staged() -> bool:
    """Returns whether operations go into a jaxpr here; under eager `grad` they run."""
    if core.trace_ctx.is_top_level():
        return False
    trace = core.trace_ctx.trace
    while trace is not None and not isinstance(trace, DynamicJaxprTrace):
        trace = getattr(trace, "parent_trace", None)
    return trace is not None


def any_device(x: jax.Array) -> jax.Array:
    """Returns whether `x` is true on any device over whose manual axes it varies."""
    axes = tuple(varying(x))
    return jax.lax.pmax(x.astype(int), axes) > 0 if axes else x


def run_if(condition: jax.Array, fun: Any, carry: Any, operands: Any) -> Any:
    """Runs `fun(carry, operands) -> (carry, ys)`, or returns the carry and zeros."""
    given = jax.tree.leaves((carry, operands))

    def leaf(y: Any) -> jax.Array:
        zeros = vary_like(jax.numpy.zeros(y.shape, y.dtype), *given)
        return zeros if y.sharding is None else reshard_to(zeros, y.sharding)

    def alike(tree: Any) -> Any:
        return jax.tree.map(lambda x: vary_like(x, *given), tree)

    ys = jax.eval_shape(fun, carry, operands)[1]
    if any(
        jax.numpy.issubdtype(y.dtype, jax.dtypes.extended) for y in jax.tree.leaves(ys)
    ):
        return fun(carry, operands)  # Keys have no zero.
    return jax.lax.cond(
        condition,
        lambda carry, operands: alike(fun(carry, operands)),
        lambda carry, _: alike((carry, jax.tree.map(leaf, ys))),
        carry,
        operands,
    )


def reshard_to(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Reshards `x` over the explicit axes of a mesh; leaves it alone if there are none.

    JAX refuses to reshard without explicit axes: there the compiler chooses.
    """
    if not sharding.mesh.explicit_axes or jax.typeof(x).sharding == sharding:
        return x
    return reshard(x, sharding)


def automatic(fun: Callable[..., Any], out: NamedSharding) -> Callable[..., Any]:
    """Lets the compiler choose the shardings inside `fun`; its results get `out`."""
    explicit = out.mesh.explicit_axes
    return auto_axes(fun, axes=explicit, out_sharding=out) if explicit else fun


def register_checkify_rule(
    primitive: Primitive, check: Callable[..., tuple[jax.Array, str, dict[str, Any]]]
) -> None:
    """Makes `checkify` raise where `check(*operands, **params)` finds a bad value.

    `check` returns a scalar predicate that is true where the check fails, a format
    string, and the scalars that the string names. The rule costs nothing without
    checkify; `checkify.check` in the public function would break other transformations.
    """

    def rule(*args: Any, **params: Any) -> tuple[Any, jax.Array]:
        # From 0.11.1 on a context comes first, and `assert_func` takes it too.
        *context, error, enabled, x, segments = args
        out = primitive.bind(x, segments, **params)
        if checkify.FailedCheckError in enabled:
            failed, message, values = check(x, segments, **params)
            exception = checkify.FailedCheckError(
                checkify.get_traceback(), message, **values
            )
            assert_func: Any = checkify.assert_func
            error = assert_func(*context, error, failed, exception)
        return error, out

    checkify.error_checks[primitive] = rule

"""What differs between JAX versions, and all that JAX gives no guarantee for.

Every import from `jax.extend`, `jax.interpreters` and `jax._src` that the package makes
stands here, and so does every branch on the version of JAX. Each branch names the first
release that no longer needs it: when that release is the oldest one supported, the
branch goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax._src import checkify, core
from jax.experimental import jet
from jax.interpreters import ad as ad, batching as batching, mlir as mlir
from jax.interpreters.xla import apply_primitive as apply_primitive
from jax.sharding import auto_axes, reshard as reshard

# `jax.extend.core` has it as well, but from 0.10 on imports Pallas with it: that is
# most of the time that importing this package would take.
Primitive = core.Primitive

JAX_VERSION = jax.__version_info__  # Numbers, also of a release candidate.


def varying(aval: Any) -> frozenset[Any]:
    """The manual mesh axes over which a value differs from device to device."""
    # The older attribute still exists on newer releases, where it is always empty.
    if JAX_VERSION >= (0, 10):  # From 0.10.0 on this is the only way.
        return frozenset(aval.mat.varying)
    return frozenset(aval.vma)


def pvary(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Marks `x` as varying over manual mesh axes; the transpose sums over them."""
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # From 0.8.2 on this is the only way.
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return jax.lax.pvary(x, tuple(axes))  # pyright: ignore


def struct_like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of an output that varies over manual mesh axes as `x` does."""
    aval = jax.typeof(x)
    if JAX_VERSION >= (0, 10):  # From 0.10.0 on this is the only way.
        varying: dict[str, Any] = dict(manual_axis_type=aval.mat)
    else:
        varying = dict(vma=aval.vma)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, **varying)


def staged(x: Any, segments: Any) -> bool:
    """Whether a bind of these operands is traced rather than run at once."""
    traced = isinstance(x, core.Tracer) or isinstance(segments, core.Tracer)
    return traced or not core.trace_ctx.is_top_level()


def automatic(fun: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """Has the compiler choose the shardings inside `fun`, whose results get `out`."""
    explicit = out.mesh.explicit_axes
    return auto_axes(fun, axes=explicit, out_sharding=out) if explicit else fun


def is_local(ctx: Any) -> bool:
    """Whether what is lowered is one device's own program, with nothing to split."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):  # Inside shard_map, perhaps partly.
        return context.manual_axes >= frozenset(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1  # That of pmap has no such field.


def register_jet_rule(primitive: Primitive, rule: Callable[..., Any]) -> None:
    """Registers a Taylor-mode rule, `rule(primals, series, **params)`."""
    jet.jet_rules[primitive] = rule


def register_checkify_rule(
    primitive: Primitive, check: Callable[..., tuple[jax.Array, str, dict[str, Any]]]
) -> None:
    """Has `checkify` raise where `check(*operands, **params)` finds a bad value.

    `check` returns a scalar predicate that is true where the check fails, a format
    string, and the scalars that the string names. A rule costs nothing where nobody
    uses checkify; `checkify.check` in the public function would make every other
    transformation fail, and `checkify.debug_check` slows each call down.
    """

    def rule(*args: Any, **params: Any) -> tuple[Any, jax.Array]:
        # From 0.11.1 on a context comes first and `assert_func` wants it back.
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

"""The primitive `reverse_segments` and its rules; the registrations stand last.

    reverse_segments_p.bind(
        x, segments, axis=, batch_axes=, layout=, padding_id=, implementation=
    )

`segments` has shape `[x.shape[a] for a in batch_axes]`, followed by nothing for the
layout "padded" (lengths), by `(K,)` for "packed" (lengths) and by `(T,)` for "ids".
`batch_axes` is deliberately unsorted: entry `i` names the axis of `x` that goes with
axis `i` of `segments`. So a dimension that `vmap` adds to both is one more entry,
wherever it lies in either, and no axis of `x` ever moves.

The map is a permutation and its own inverse, hence linear and its own transpose: every
derivative rule is the same bind on another operand.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_revseg import _compat
from jax_revseg._compat import ad, batching, mlir
from jax_revseg._lowering import packed_sums, reverse_gather

LAYOUTS = ("padded", "packed", "ids")
Implementation = Literal["xla", "pallas"]


def _check(x, segments, axis, batch_axes, layout, implementation):
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"reverse_segments: implementation is {implementation!r}; use one of "
            f"{get_args(Implementation)}."
        )
    if layout not in LAYOUTS:
        raise ValueError(
            f"reverse_segments_p: layout is {layout!r}; use one of {LAYOUTS}."
        )
    axes = (*batch_axes, axis)
    if len(set(axes)) != len(axes) or not all(0 <= a < x.ndim for a in axes):
        raise ValueError(
            f"reverse_segments_p: axis {axis} and batch_axes {batch_axes} must be "
            f"different axes of x, which has rank {x.ndim}; count them from 0."
        )
    shape = tuple(x.shape[a] for a in batch_axes)
    if layout == "ids":
        shape += (x.shape[axis],)
    batch, rest = segments.shape[: len(shape)], segments.shape[len(shape) :]
    if batch != shape or len(rest) != (layout == "packed"):
        raise ValueError(
            f"reverse_segments_p: segments has shape {segments.shape}, but layout "
            f"{layout!r} with axis {axis} and batch_axes {batch_axes} of x, which has "
            f"shape {x.shape}, needs {(*shape, 'K') if layout == 'packed' else shape}."
        )
    if not jnp.issubdtype(segments.dtype, jnp.integer):
        raise TypeError(
            f"reverse_segments_p: segments has dtype {segments.dtype}; use integers."
        )


def _sharded_axis_remedy(x, axis, batch_axes, layout, padding_id):
    """Three lines that reverse an x whose segment axis is sharded."""
    spec = x.sharding.spec
    rows = [spec[a] for a in batch_axes]
    rows += {"padded": [], "packed": [None], "ids": [spec[axis]]}[layout]
    call = {
        "padded": "reverse_sequence(x, lengths",
        "packed": "reverse_segments(x, lengths",
        "ids": f"reverse_segments(x, segment_ids=ids, padding_id={padding_id}",
    }[layout]
    operand = "ids" if layout == "ids" else "lengths"
    axes = f"axis={axis}, batch_axis={batch_axes}, axis_name={spec[axis]!r}"
    return (
        f"    mesh, spec, rows = jax.typeof(x).sharding.mesh, jax.P{tuple(spec)}, "
        f"jax.P{tuple(rows)}\n"
        f"    local = jax.shard_map(lambda x, {operand}: {call}, {axes}), "
        "mesh=mesh, in_specs=(spec, rows), out_specs=spec)\n"
        "    out = jax.jit(lambda x, rest: local(x, jax.sharding.reshard(rest, "
        f"jax.NamedSharding(mesh, rows))))(x, {operand})\n"
    )


def _merged_spec(x, segments, axis, batch_axes, **layout):
    """Gives the batch axes the sharding of x and of the segments, as `add` would."""
    for what, operand in (("x", x), ("lengths or ids", segments)):
        partial_sums = operand.sharding.spec
        if partial_sums.unreduced or partial_sums.reduced:
            raise ValueError(
                f"reverse_segments: {what} has sharding {partial_sums}; partial sums "
                "(unreduced, reduced) are not supported: use jax.sharding.reshard to "
                "a sharding without them first."
            )
    spec = list(x.sharding.spec)
    if spec[axis] is not None:
        raise ValueError(
            f"reverse_segments: axis {axis} of x, the segment axis, is sharded over "
            f"mesh axis {spec[axis]!r}; a reversal along a sharded axis needs data of "
            "other devices. Replicate that axis first, with jax.sharding.reshard, or "
            f"keep it sharded and exchange blocks, with axis_name={spec[axis]!r}:\n"
            + _sharded_axis_remedy(x, axis, batch_axes, **layout)
        )
    for i, name in enumerate(segments.sharding.spec):
        if name is None:
            continue
        if i < len(batch_axes):
            a = batch_axes[i]
            taken = set(jax.tree.leaves(spec)) & set(jax.tree.leaves(name))
            if spec[a] == name or (spec[a] is None and not taken):
                spec[a] = name
                continue
            but = f"x, whose axis {a} goes with it, is sharded as {tuple(spec)}"
        else:
            but = "it runs along the segment axis, which cannot be sharded"
        raise ValueError(
            f"reverse_segments: axis {i} of the lengths or ids is sharded over mesh "
            f"axis {name!r}, but {but}. Give both the same sharding with "
            "jax.sharding.reshard."
        )
    return tuple(spec)


def _reverse_segments_abstract_eval(
    x, segments, *, axis, batch_axes, layout, padding_id=None, implementation="xla"
):
    _check(x, segments, axis, batch_axes, layout, implementation)
    missing = _compat.varying(segments) - _compat.varying(x)
    if missing:
        # Were x's own type returned here, shard_map would take a result that differs
        # between devices for a replicated one, and gradients would lack a sum.
        raise ValueError(
            f"reverse_segments_p: segments vary over manual mesh axes {set(missing)} "
            "and x does not; mark x with jax.lax.pcast(..., to='varying') first."
        )
    spec = _merged_spec(
        x, segments, axis, batch_axes, layout=layout, padding_id=padding_id
    )
    if spec == tuple(x.sharding.spec):
        return x.update()
    mesh = (segments if x.sharding.mesh.empty else x).sharding.mesh
    return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _reverse_segments_jvp(tangent, x, segments, **params):
    return reverse_segments_p.bind(tangent, segments, **params)


def _reverse_segments_transpose(ct, x, segments, **params):
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval), None]
    ct_x = reverse_segments_p.bind(ct, segments, **params)
    # The output may be sharded like the segments where x was not: give x's sharding
    # back.
    if jax.typeof(ct_x).sharding != x.aval.sharding:
        ct_x = _compat.reshard(ct_x, x.aval.sharding)
    return [ct_x, None]


def _reverse_segments_batching(axis_data, operands, dims, *, axis, batch_axes, **rest):
    x, segments = operands
    x_dim, segments_dim = dims
    if segments_dim is None and x_dim is None:  # JAX calls with nothing mapped, too.
        params = dict(axis=axis, batch_axes=batch_axes, **rest)
        return reverse_segments_p.bind(x, segments, **params), None
    if x_dim is None:
        mesh_axis = axis_data.explicit_mesh_axis
        x = batching.broadcast(x, axis_data.size, 0, mesh_axis=mesh_axis)
        x_dim = 0
    axis += axis >= x_dim
    batch_axes = tuple(a + (a >= x_dim) for a in batch_axes)
    if segments_dim is not None:
        if segments_dim > len(batch_axes):  # Behind the axis of K or T: bring it back.
            segments = jnp.moveaxis(segments, segments_dim, 0)
            segments_dim = 0
        batch_axes = (*batch_axes[:segments_dim], x_dim, *batch_axes[segments_dim:])
    params = dict(axis=axis, batch_axes=batch_axes, **rest)
    return reverse_segments_p.bind(x, segments, **params), x_dim


def _reverse_segments_jet(primals, series, **params):
    x, segments = primals
    # `jet.deflinear` would bind the (zero) series of the segments in their place.
    return (
        reverse_segments_p.bind(x, segments, **params),
        [reverse_segments_p.bind(term, segments, **params) for term in series[0]],
    )


def _reverse_segments_checkify(x, segments, *, axis, layout, **_):
    size = x.shape[axis]
    if layout == "ids" or 0 in segments.shape:  # No id is out of range.
        return jnp.bool_(False), "", {}
    if layout == "padded":
        message = "is {value}, but must lie between 0 and"
    else:
        message = "is {value}; lengths must not be negative (nor cu_seqlens decrease), "
        message += "and those of a row must not sum to more than"

    def first_bad(segments):
        # An int8 length cannot pass 300, and 300 cannot be compared with an int8.
        bad = (segments < 0) | (segments > min(size, jnp.iinfo(segments.dtype).max))
        if layout == "packed":  # Each within the size, and yet too much together.
            bad |= packed_sums(segments, size) > size
        first = jnp.argmax(bad.ravel())
        row = jnp.unravel_index(first, bad.shape)
        return jnp.any(bad), segments.ravel()[first], *row

    # Every device gets the answer: under explicit sharding that has to be said.
    everywhere = NamedSharding(jax.typeof(segments).sharding.mesh, PartitionSpec())
    failed, value, *row = _compat.automatic(first_bad, everywhere)(segments)
    names = [f"i{n}" for n in range(len(row))]
    where = ", ".join(f"{{{name}}}" for name in names)
    message = f"reverse_segments: lengths[{where}] {message} {size}, the size of axis "
    message += f"{axis} of x."
    return failed, message, {"value": value, **dict(zip(names, row, strict=True))}


@partial(
    jax.jit, static_argnames=("axis", "batch_axes", "layout", "padding_id", "windows")
)
def _reverse_gather(x, segments, **params):
    # One function in the module for any number of calls with these shapes.
    return reverse_gather(x, segments, **params)


def _lower(fun, ctx, x, segments):
    # Under explicit sharding the arithmetic on indices would be checked like a user's
    # own, and each operation given a sharding. Let the compiler see to the inside; the
    # outside is what abstract evaluation promised.
    fun = _compat.automatic(fun, ctx.avals_out[0].sharding)
    return mlir.lower_fun(fun, multiple_results=False)(ctx, x, segments)


def _reverse_segments_lowering(ctx, x, segments, *, implementation="xla", **params):
    return _lower(partial(_reverse_gather, **params), ctx, x, segments)


def _reverse_segments_tpu_lowering(ctx, x, segments, *, implementation="xla", **params):
    if implementation == "pallas" and _compat.is_local(ctx):
        # Pallas takes longer to import than all the rest, and few will need it.
        from jax_revseg import _kernel_tpu

        axes = {name: params[name] for name in ("axis", "batch_axes")}
        if plan := _kernel_tpu.plan(ctx.avals_in[0], **axes):
            kernel = partial(_kernel_tpu.reverse, plan=plan, **params)
            return _lower(kernel, ctx, x, segments)
    return _reverse_segments_lowering(ctx, x, segments, windows=True, **params)


reverse_segments_p = _compat.Primitive("reverse_segments")
reverse_segments_p.def_impl(partial(_compat.apply_primitive, reverse_segments_p))
reverse_segments_p.def_abstract_eval(_reverse_segments_abstract_eval)
mlir.register_lowering(reverse_segments_p, _reverse_segments_lowering)
mlir.register_lowering(
    reverse_segments_p,
    partial(_reverse_segments_lowering, windows=True),
    platform="cpu",
)
mlir.register_lowering(
    reverse_segments_p, _reverse_segments_tpu_lowering, platform="tpu"
)
ad.defjvp(reverse_segments_p, _reverse_segments_jvp, None)
ad.primitive_transposes[reverse_segments_p] = _reverse_segments_transpose
batching.fancy_primitive_batchers[reverse_segments_p] = _reverse_segments_batching
_compat.register_jet_rule(reverse_segments_p, _reverse_segments_jet)
_compat.register_checkify_rule(reverse_segments_p, _reverse_segments_checkify)

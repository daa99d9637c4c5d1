"""Inside shard_map, where JAX tracks which values differ between devices.

The bug that this guards against: x replicated and lengths sharded. Each device then
reverses the same x by its own lengths, so the gradient of x is a sum over devices. A
rule that keeps the type of x for the result loses that sum: values are right, gradients
silently wrong.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import jax_revseg
from jax_revseg import pack_segments, unpack_segments
from jax_revseg._layout import Layout
from tests.cases import assert_same_bits, reverse_order
from tests.meshes import CASES, by_hand, integers, make_mesh, with_gradients

BOTH = ("a", "b")
# For x, segments and the result; and how many rows of x go with 8 rows of segments.
SPECS = {
    "rows": (P("a"), P("a"), P("a"), 8),
    "rows-and-features": (P("a", None, "b"), P("a"), P("a", None, "b"), 8),
    # The segments vary over mesh axes over which x does not:
    "x-replicated": (P(), P("a"), P("a"), 2),
    "x-less-sharded": (P("a"), P(BOTH), P(BOTH), 4),
    "one-axis-each": (P("b"), P("a"), P(BOTH), 4),
}
MESH = make_mesh()
SEGMENTS = [case.segments() for case in CASES]


def operands(name):
    x, rows = integers((SPECS[name][3], 6, 4)), 16 if name == "one-axis-each" else 8
    return x, [integers((rows, 6, 4), seed) for seed in range(len(CASES))]


def every_case(wrapper=lambda f: f):
    """One program for all cases: compiling it takes the time."""
    calls = [wrapper(case.call) for case in CASES]
    return lambda x, segments: [f(x, s) for f, s in zip(calls, segments, strict=True)]


def sharded(f, name="x-replicated", mesh=MESH, **more):
    x_spec, spec, out_spec, _ = SPECS[name]
    return jax.shard_map(
        f, mesh=mesh, in_specs=(x_spec, spec), out_specs=out_spec, **more
    )


def check(
    f, name="x-replicated", place=lambda tree, spec: tree, jit=jax.jit, value=None
):
    """Values and gradient of `f(x, segments)`, which must be the reversals."""
    x, cts = operands(name)
    x_spec, spec, *_ = SPECS[name]
    run = jit(partial(with_gradients, f))
    ys, x_bar = run(place(x, x_spec), place(SEGMENTS, spec), cts)
    want_bar = np.zeros_like(x)
    for case, segments, y, ct in zip(CASES, SEGMENTS, ys, cts, strict=True):
        want, share = by_hand(case, x, segments, ct, *SPECS[name][:3], value)
        assert_same_bits(y, want, case.name)
        want_bar += share
    np.testing.assert_array_equal(x_bar, want_bar)


@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients(name):
    """Fails on a sum over devices that is missing, or made twice."""
    check(sharded(every_case(), name), name)


def test_eager():
    """Fails if tracers take the way of an eager call."""
    check(sharded(every_case()), jit=lambda f: f)


def test_unchecked():
    """Fails if a rule needs to know which values vary."""
    check(sharded(every_case(), check_vma=False))


@pytest.mark.parametrize("kinds", ("Auto", "Explicit Auto", "Auto Explicit"))
def test_partly_manual(kinds):
    """Fails if the mesh axis that shard_map leaves alone is taken for a manual one, or
    an explicit sharding over it stops the index arithmetic."""
    over = make_mesh(kinds)
    # An explicit axis takes what is laid out as `in_specs` says, and nothing else.
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(over, spec))  # noqa: E731
    check(sharded(every_case(), mesh=over, axis_names={"a"}), place=place)


INSIDE = {
    "vmap-segments": lambda f: lambda x, s: jax.vmap(f, (None, 0))(x, s[None])[0],
    "scan": lambda f: lambda x, s: lax.map(lambda s: f(x, s), s[None])[0],
    "remat": jax.checkpoint,
    "cond": lambda f: (
        lambda x, s: lax.cond(s.sum() < 0, lambda x, s: f(f(x, s), s), f, x, s)
    ),
}


@pytest.mark.parametrize("transform", INSIDE.values(), ids=INSIDE)
def test_transformed_inside(transform):
    """Fails if a rule of the transformation loses the sum over devices."""
    check(sharded(every_case(transform)))


OUTSIDE = {
    "vmap-segments": lambda f: lambda x, s: jax.vmap(f, (None, 0))(x, add_axis(s)),
    "vmap-over-axis": lambda f: (
        lambda x, s: jax.vmap(f, (None, 0), spmd_axis_name="b")(
            x, jax.tree.map(lambda s: jnp.stack([s, s]), s)
        )
    ),
    "scan": lambda f: lambda x, s: lax.map(lambda s: f(x, s), add_axis(s)),
}


def add_axis(tree):
    return jax.tree.map(lambda s: s[None], tree)


@pytest.mark.parametrize("transform", OUTSIDE.values(), ids=OUTSIDE)
def test_transformed_outside(transform):
    """Fails if the sum over devices, or over a mesh axis that vmap names, is lost."""
    call = transform(sharded(every_case()))
    check(lambda x, s: [y[0] for y in call(x, s)])


def test_gradient_inside():
    """Fails if the gradients of devices that share an x are not summed."""
    name = "one-axis-each"
    x, cts = operands(name)
    x_spec, spec, out_spec, _ = SPECS[name]

    @jax.jit
    @jax.shard_map(mesh=MESH, in_specs=(x_spec, spec, out_spec), out_specs=x_spec)
    def gradient(x, segments, cts):
        return with_gradients(every_case(), x, segments, cts)[1]

    given = zip(CASES, SEGMENTS, cts, strict=True)
    shares = [by_hand(c, x, s, ct, *SPECS[name][:3])[1] for c, s, ct in given]
    np.testing.assert_array_equal(gradient(x, SEGMENTS, cts), sum(shares))


@pytest.mark.parametrize("name", ("rows", "x-replicated"))
def test_varying_result_is_not_replicated(name):
    """Fails on out_specs=P() accepted, and one device's result taken for all."""
    case, (x_spec, spec, *_) = CASES[0], SPECS[name]
    f = jax.shard_map(case.call, mesh=MESH, in_specs=(x_spec, spec), out_specs=P())
    with pytest.raises(ValueError, match="replicated"):
        f(operands(name)[0], SEGMENTS[0])


def test_bind_refuses_what_would_lose_the_sum():
    """Fails if the primitive accepts segments that vary more than x."""
    layout = Layout("padded", 1, (0,))
    bind = partial(jax_revseg.reverse_segments_p.bind, layout=layout)
    with pytest.raises(ValueError, match=r"vary over manual mesh axes \{'a'\}"):
        sharded(bind)(operands("x-replicated")[0], SEGMENTS[0])


def test_padding_value():
    """Fails if padding is filled wrongly, or gets a gradient."""
    calls = every_case(lambda f: partial(f, padding_value=5.0))
    check(sharded(calls), value=5.0)


def test_order_of_segments():
    """Fails if the sums of lengths mix varying and other values."""
    x, _ = operands("x-replicated")
    outs = jax.jit(sharded(jax_revseg.reverse_segment_order))(x, SEGMENTS[1])
    tiled, axes = np.tile(x, (4, 1, 1)), dict(axis=1, batch_axes=(0,))
    for out, want in zip(outs, reverse_order(tiled, SEGMENTS[1], **axes), strict=True):
        assert_same_bits(out, want)


def test_packing():
    """Fails if packing, or its gradient, is wrong where lengths vary and x does not."""
    x, lengths = integers((6, 4)), SEGMENTS[0] // 3

    def both(x, n):
        rows = pack_segments(x, n, max_length=3)
        return unpack_segments(rows, n, total_length=6)

    ct = integers((24, 4), 1)
    y, x_bar = jax.jit(partial(with_gradients, sharded(both)))(x, lengths, ct)
    kept = np.arange(6) < lengths.reshape(4, 2).sum(1)[:, None]
    want = np.where(kept[..., None], x, 0).reshape(24, 4)
    np.testing.assert_array_equal(y, want)
    want = (ct.reshape(4, 6, 4) * kept[..., None]).sum(0)
    np.testing.assert_array_equal(x_bar, want)


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="this JAX has no pmap any more")
def test_pmap():
    """Fails on a gradient that is not summed over the devices that share x."""
    x = integers((1, 6, 4))
    segments = [s[:, None] for s in SEGMENTS]  # One row on each of 8 devices.
    cts = [integers((8, 1, 6, 4), seed) for seed in range(len(CASES))]
    f = jax.pmap(every_case(), in_axes=(None, 0))
    ys, x_bar = with_gradients(f, x, segments, cts)
    want_bar = np.zeros_like(x)
    for case, s, y, ct in zip(CASES, SEGMENTS, ys, cts, strict=True):
        assert_same_bits(y[:, 0], case.expected(np.tile(x, (8, 1, 1)), s), case.name)
        want_bar += case.expected(ct[:, 0], s).sum(0)
    np.testing.assert_array_equal(x_bar, want_bar)


def test_empty_arrays_vary_over_devices():
    """Fails if `out_specs=P()` accepts a result of which each device has another."""
    n = jnp.ones(4, int)
    for f, x in (
        (partial(jax_revseg.reverse_sequence, padding_value=1.0), jnp.ones((4, 0))),
        (lambda x, n: pack_segments(x[:0], n, max_length=2), jnp.ones((4, 2))),
        (lambda x, n: unpack_segments(x[:, :0], n, total_length=2), jnp.ones((4, 2))),
        (lambda x, n: unpack_segments(x[:0], n[:0], total_length=2), jnp.ones((4, 2))),
    ):
        run = partial(jax.shard_map, f, mesh=MESH, in_specs=(P("a"), P("a")))
        # JAX 0.7 cannot run any program on an empty array with a sharding.
        jax.eval_shape(run(out_specs=P("a")), x, n)
        with pytest.raises(ValueError):
            jax.eval_shape(run(out_specs=P()), x, n)

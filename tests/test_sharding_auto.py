"""Mesh axes of type Auto: the compiler chooses, and must not move data for it."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jax_revseg import reverse_segment_order
from tests.cases import assert_same_bits
from tests.meshes import CASES, collectives, integers, mesh, put

MESH = mesh()
SHAPE = (8, 8, 8)  # Every axis can be cut over all devices.
SEGMENTS = [case.segments() for case in CASES]
SEGMENTS[2] = np.pad(SEGMENTS[2], ((0, 0), (0, 2)))  # Two more ids for T = 8.
both = ("a", "b")
SPECS = {  # Of x, and of the rows of segments.
    "rows-and-features": (P("a", None, "b"), "a"),
    "rows-over-both": (P(both), both),
    "features-over-both": (P(None, None, both), None),
    "rows-of-x-only": (P("a"), None),
}


@contextlib.contextmanager
def partitioner(name):
    """Shardy, or GSPMD as long as JAX has it."""
    flag = "jax_use_shardy_partitioner"
    if not hasattr(jax.config, flag):
        if name == "gspmd":
            pytest.skip("this JAX has no GSPMD partitioner any more")
        yield
        return
    before = getattr(jax.config, flag)
    jax.config.update(flag, name == "shardy")
    try:
        yield
    finally:
        jax.config.update(flag, before)


each_partitioner = pytest.mark.parametrize("which", ("shardy", "gspmd"))


def calls(xs, segments):
    """All cases in one program: compiling takes the time."""
    return [case.call(x, s) for case, x, s in zip(CASES, xs, segments, strict=True)]


def gradients(xs, segments, cts):
    return jax.vjp(lambda xs: calls(xs, segments), xs)[1](cts)[0]


def operands(x_spec, rows):
    segments = [put(MESH, s, rows, *[None] * (s.ndim - 1)) for s in SEGMENTS]
    xs = [put(MESH, integers(SHAPE, i), *x_spec) for i in range(len(CASES))]
    return xs, segments


@each_partitioner
@pytest.mark.parametrize("name", SPECS)
def test_no_collective(name, which):
    """Fails on devices that exchange data, or all hold the whole."""
    xs, segments = operands(*SPECS[name])
    with partitioner(which):
        assert collectives(calls, xs, segments) == []
        assert collectives(gradients, xs, segments, xs) == []
        ys = jax.jit(calls)(xs, segments)
        x_bars = jax.jit(gradients)(xs, segments, xs)
    for case, x, s, y, x_bar in zip(CASES, xs, SEGMENTS, ys, x_bars, strict=True):
        want = case.expected(np.asarray(x), s)
        assert_same_bits(y, want, case.name)
        assert_same_bits(x_bar, want, case.name)  # The cotangent is x as well.
        assert y.sharding.is_equivalent_to(x.sharding, 3), case.name
        assert x_bar.sharding.is_equivalent_to(x.sharding, 3), case.name


@each_partitioner
def test_other_axes(which):
    """Fails if only batch axes in front work: here time-major, with two batch axes."""
    call = jax.vmap(CASES[0].call, (2, 1), 2)  # Lengths (8, 8), x (8, 8, 8, 8).
    x = put(MESH, integers((8, 8, 8, 8)), "a", None, "b", None)
    lengths = np.arange(64).reshape(8, 8) % 9
    segments = put(MESH, lengths, "a", "b")
    with partitioner(which):
        assert collectives(call, x, segments) == []
        y = jax.jit(call)(x, segments)
    for i in range(8):
        want = CASES[0].expected(np.asarray(x)[:, :, i], lengths[:, i])
        np.testing.assert_array_equal(y[:, :, i], want)


@each_partitioner
@pytest.mark.parametrize("x_spec, rows", ((P(None, "a"), None), (P(), "a")))
def test_shardings_that_need_an_exchange(x_spec, rows, which):
    """Fails on wrong values where the segment axis, or the segments alone, are
    sharded."""
    xs, segments = operands(x_spec, rows)
    with partitioner(which):
        if x_spec:  # Else `collectives` is blind, and the tests above see nothing.
            assert collectives(calls, xs, segments)
        ys = jax.jit(calls)(xs, segments)
        x_bars = jax.jit(gradients)(xs, segments, xs)
    for case, x, s, y, x_bar in zip(CASES, xs, SEGMENTS, ys, x_bars, strict=True):
        want = case.expected(np.asarray(x), s)
        assert_same_bits(y, want, case.name)
        assert_same_bits(x_bar, want, case.name)


@pytest.mark.parametrize("name", ("rows-and-features", "rows-over-both"))
def test_inside_a_layer(name):
    """Fails if the reversal changes the sharding of a mask before or of a sum after
    it."""
    x_spec, rows = SPECS[name]
    xs, segments = operands(x_spec, rows)

    def layer(x, s):
        x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, x_spec))
        return CASES[0].call(x, s, padding_value=1.0) + 1

    def energy_gradient(x, s):
        return jax.grad(lambda x: (layer(x, s) ** 2).sum())(x)

    assert collectives(layer, xs[0], segments[0]) == []
    assert collectives(energy_gradient, xs[0], segments[0]) == []
    want = CASES[0].expected(2 * np.asarray(xs[0]), SEGMENTS[0], 1.0) + 1
    np.testing.assert_array_equal(jax.jit(layer)(xs[0], segments[0]), want)


def test_order_of_segments_without_collectives():
    """Fails if lengths are summed across devices."""
    xs, segments = operands(P("a", None, "b"), "a")
    assert collectives(reverse_segment_order, xs[1], segments[1]) == []

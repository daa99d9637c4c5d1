"""Mesh axes of type Auto: the compiler chooses, and must not move data for it."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jax_revseg import reverse_segment_order
from tests import meshes
from tests.cases import assert_same_bits
from tests.meshes import CASES, bytes_received, integers, make_mesh, put

MESH = make_mesh()
FLAG = "jax_use_shardy_partitioner"
SHAPE = (8, 8, 8)  # Every axis can be cut over all devices.
SEGMENTS = [case.segments() for case in CASES]
SEGMENTS[2] = np.pad(SEGMENTS[2], ((0, 0), (0, 2)))  # Two more ids for T = 8.
BOTH = ("a", "b")
SPECS = {  # Of x, and of the rows of segments.
    "rows-and-features": (P("a", None, "b"), "a"),
    "rows-over-both": (P(BOTH), BOTH),
    "features-over-both": (P(None, None, BOTH), None),
    "rows-of-x-only": (P("a"), None),
}
EXCHANGES = {"steps": (P(None, "a"), None), "segments-only": (P(), "a")}


@pytest.fixture(params=("shardy", "gspmd"))
def partitioner(request):
    """Shardy, or GSPMD as long as JAX has it."""
    before, flag = getattr(jax.config, FLAG, None), request.param == "shardy"
    if before is None and not flag:
        pytest.skip("this JAX has no GSPMD partitioner any more")
    if before is None:
        yield
    else:
        jax.config.update(FLAG, flag)
        yield
        jax.config.update(FLAG, before)


each_partitioner = pytest.mark.usefixtures("partitioner")


def operands(x_spec, rows):
    segments = [put(MESH, s, rows, *[None] * (s.ndim - 1)) for s in SEGMENTS]
    xs = [put(MESH, integers(SHAPE, i), *x_spec) for i in range(len(CASES))]
    return xs, segments


def run(f, *operands):
    """The results of one program, and its collectives."""
    compiled = jax.jit(f).lower(*operands).compile()
    return compiled(*operands), bytes_received(compiled)


@each_partitioner
@pytest.mark.parametrize("name", SPECS | EXCHANGES)
def test_values_and_gradients(name):
    """Fails on wrong values, on devices that exchange data, or all hold the whole."""
    xs, segments = operands(*(SPECS | EXCHANGES)[name])
    f = partial(meshes.with_gradients, meshes.calls)
    (ys, x_bars), exchanged = run(f, xs, segments, xs)
    assert not exchanged or name in EXCHANGES
    assert exchanged or name != "steps"  # Else this test is blind to collectives.
    for case, x, s, *both in zip(CASES, xs, SEGMENTS, ys, x_bars, strict=True):
        for y in both:  # The cotangent is x as well.
            assert_same_bits(y, case.expected(np.asarray(x), s), case.name)
            same = y.sharding.is_equivalent_to(x.sharding, 3)
            assert same or name in EXCHANGES, case.name


@each_partitioner
def test_other_axes():
    """Fails if only batch axes in front work: here time-major, with two batch axes."""
    call = jax.vmap(CASES[0].call, (2, 1), 2)  # Lengths (8, 8), x (8, 8, 8, 8).
    x = put(MESH, integers((8, 8, 8, 8)), "a", None, "b", None)
    lengths = np.arange(64).reshape(8, 8) % 9
    y, exchanged = run(call, x, put(MESH, lengths, "a", "b"))
    assert not exchanged
    for i in range(8):
        want = CASES[0].expected(np.asarray(x)[:, :, i], lengths[:, i])
        np.testing.assert_array_equal(y[:, :, i], want)


def test_inside_a_layer():
    """Fails if the reversal changes the sharding of a mask before or of a sum after it,
    or if the order of segments sums lengths across devices."""
    x_spec, rows = SPECS["rows-and-features"]
    (x, *_), (lengths, packed, _) = operands(x_spec, rows)

    def layer(x, s):
        x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, x_spec))
        return CASES[0].call(x, s, padding_value=1.0) + 1

    def everything(x, lengths, packed):
        gradient = jax.grad(lambda x: (layer(x, lengths) ** 2).sum())(x)
        return layer(x, lengths), gradient, reverse_segment_order(x, packed)

    (y, *_), exchanged = run(everything, x, lengths, packed)
    assert not exchanged
    want = CASES[0].expected(2 * np.asarray(x), SEGMENTS[0], 1.0) + 1
    np.testing.assert_array_equal(y, want)

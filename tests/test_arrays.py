"""What an array can be: any dtype under any transformation, a key, donated, laid out
otherwise, on another device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from jax_revseg import reverse_sequence
from tests.cases import DTYPES, SMALL, Case, assert_same_bits, enable_x64, random_bits

LENGTHS = np.array([3, 7, 0, 4])
ROWS = Case("rows", (4, 7, 2))


def stacked(case, x, segments):
    """vmap, scan, cond and remat around a reversal; the scan turns thrice."""

    @jax.checkpoint
    def turn(x, _):
        mapped = jax.vmap(lambda x, s: case.call(x[None], s[None])[0])
        return lax.cond(segments.sum() >= 0, mapped, lambda x, _: x, x, segments), 0

    return lax.scan(turn, x, length=3)[0]  # Three times is once.


def test_every_dtype_under_a_stack():
    """Fails if a rule refuses a dtype, changes bits, or takes the axis inside keys."""
    with enable_x64():
        rng = np.random.default_rng(0)
        xs = {d: random_bits(rng, (4, 7, 2), d) for d in DTYPES}
        xs["keys"] = jax.random.split(jax.random.key(0), (4, 7, 2))
        cases = dict(zip(xs, itertools.cycle(SMALL[:3]), strict=False))
        segments = {d: cases[d].segments() for d in xs}
        linear = [d for d in DTYPES if jnp.issubdtype(d, jnp.inexact)]

        @jax.jit
        def run(xs, segments):
            ys = {d: stacked(cases[d], x, segments[d]) for d, x in xs.items()}
            bars = {}
            for d in linear:
                _, vjp = jax.vjp(lambda x: stacked(cases[d], x, segments[d]), xs[d])  # noqa: B023
                bars[d] = vjp(xs[d])[0]
            return ys, bars

        ys, bars = run(xs, segments)
    data = np.asarray(jax.random.key_data(xs.pop("keys")))
    want = cases["keys"].expected(data, segments["keys"])
    np.testing.assert_array_equal(jax.random.key_data(ys["keys"]), want)
    for d, x in xs.items():
        want = cases[d].expected(x, segments[d])
        for y in (ys[d], bars[d]) if d in linear else (ys[d],):
            assert_same_bits(y, want, d)


def test_four_bit_floats_in_a_loop_over_rows():
    """Fails if XLA cannot compile it: a bitcast of 4 bits is too much for it there."""
    case, lengths = Case("loop", (3, 5), "float4_e2m1fn"), np.array([2, 5, 0])
    run = jax.jit(lambda *rows: lax.map(lambda row: reverse_sequence(*row), rows))
    assert_same_bits(run(case.x(), lengths), case.expected(case.x(), lengths))


def test_key_reuse():
    """Fails on another rule than `lax.rev` has, which uses its keys up."""
    keys = jax.random.split(jax.random.key(0), 4)
    for reverse in (lambda k: lax.rev(k, (0,)), lambda k: reverse_sequence(k, 3)):
        twice = jax.jit(lambda k: (reverse(k), jax.vmap(jax.random.bits)(k)))  # noqa: B023
        with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
            twice(keys)


def test_donation():
    """Fails on an output written over the input that it is still read from."""
    donated = jnp.array(ROWS.x())
    y = jax.jit(ROWS.call, donate_argnums=0)(donated, LENGTHS)
    assert_same_bits(y, ROWS.expected(ROWS.x(), LENGTHS))
    assert donated.is_deleted()


def test_custom_layouts():
    """Fails on strides of another layout than the array's own."""
    x, order = ROWS.x(), (2, 0, 1)
    layout = Format(Layout(order), SingleDeviceSharding(jax.devices()[0]))
    laid_out = jax.device_put(x, layout)
    call = jax.jit(reverse_sequence, in_shardings=(layout, None), out_shardings=layout)
    for y in (reverse_sequence(laid_out, LENGTHS), call(laid_out, LENGTHS)):
        assert_same_bits(y, ROWS.expected(x, LENGTHS))
    assert y.format.layout.major_to_minor == order


def test_committed_to_another_device():
    """Fails on a result that wanders to the default device, or devices mixed."""
    first, other = jax.devices()[2:4]
    x = jax.device_put(ROWS.x(), other)
    want = ROWS.expected(ROWS.x(), LENGTHS)
    for lengths in (LENGTHS, LENGTHS.tolist(), jax.device_put(LENGTHS, other)):
        y = reverse_sequence(x, lengths)
        assert y.devices() == {other}
        assert_same_bits(y, want)
        _, vjp = jax.vjp(lambda x: reverse_sequence(x, lengths), x)  # noqa: B023
        assert vjp(y)[0].devices() == {other}
    assert reverse_sequence(x, LENGTHS, padding_value=0.0).devices() == {other}
    with jax.default_device(first):
        assert reverse_sequence(ROWS.x(), LENGTHS).devices() == {first}
    with pytest.raises(ValueError, match="incompatible devices"):
        reverse_sequence(x, jax.device_put(LENGTHS, first))

"""What an array can be: any dtype under any transformation, a key, donated, laid out
otherwise, on another device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.layout import Format, Layout

from jax_revseg import reverse_sequence
from tests.cases import (
    DTYPES,
    WIDE,
    Case,
    assert_same_bits,
    enable_x64,
    random_bits,
)

CASES = tuple(
    Case(f"{layout}-arrays", (4, 7, 2), layout=layout, padding_id=0)
    for layout in ("padded", "packed", "ids")
)
SEGMENTS = [case.segments() for case in CASES]
LENGTHS = np.array([3, 7, 0, 4])
ROWS = Case("rows", (4, 7, 2))


def stacked(x, segments):
    """vmap, scan, cond and remat around all three encodings; the scan turns thrice."""

    def row(x, *segments):
        for case, s in zip(CASES, segments, strict=True):
            x = case.call(x[None], s[None])[0]
        return x

    @jax.checkpoint
    def turn(x, _):
        mapped = jax.vmap(row)
        return lax.cond(
            segments[0].sum() >= 0, mapped, lambda x, *_: x, x, *segments
        ), 0

    return lax.scan(turn, x, length=3)[0]


def by_hand(x, order):
    for _ in range(3):
        for i in order:
            x = CASES[i].expected(x, SEGMENTS[i])
    return x


def test_every_dtype_under_a_stack():
    """Fails on a dtype that a rule cannot take, or whose bits one changes, or on the
    hidden axis of keys taken for one of theirs."""
    with enable_x64():
        rng = np.random.default_rng(0)
        xs = {d: random_bits(rng, (4, 7, 2), d) for d in DTYPES}
        xs["keys"] = jax.random.split(jax.random.key(0), (4, 7, 2))
        segments = [jnp.asarray(s) for s in SEGMENTS]
        linear = [d for d in DTYPES if jnp.issubdtype(d, jnp.inexact)]

        @jax.jit
        def run(xs, segments):
            ys = {d: stacked(x, segments) for d, x in xs.items()}
            bars = {}
            for d in linear:
                _, vjp = jax.vjp(lambda x: stacked(x, segments), xs[d])
                bars[d] = vjp(xs[d])[0]
            return ys, bars

        ys, bars = run(xs, segments)
    assert set(WIDE) <= set(ys)
    data = np.asarray(jax.random.key_data(xs.pop("keys")))
    parts = [by_hand(data[..., i], (0, 1, 2)) for i in range(data.shape[-1])]
    np.testing.assert_array_equal(jax.random.key_data(ys["keys"]), np.stack(parts, -1))
    for d, x in xs.items():
        assert_same_bits(ys[d], by_hand(x, (0, 1, 2)), d)
    for d in linear:
        assert_same_bits(bars[d], by_hand(xs[d], (2, 1, 0)), d)


def test_four_bit_floats_in_a_loop_over_rows():
    """Fails if XLA cannot compile it: a bitcast of 4 bits is too much for it there."""
    x, lengths = (
        random_bits(np.random.default_rng(0), (3, 5), "float4_e2m1fn"),
        [2, 5, 0],
    )
    given = jnp.asarray(x), jnp.array(lengths)
    out = jax.jit(lambda given: lax.map(lambda row: reverse_sequence(*row), given))(
        given
    )
    want = Case("loop", x.shape, "float4_e2m1fn").expected(x, np.array(lengths))
    assert_same_bits(out, want)


def test_key_reuse():
    """Fails on another rule than `lax.rev` has, which uses its keys up."""
    for reverse in (lambda k: lax.rev(k, (0,)), lambda k: reverse_sequence(k, 3)):
        with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda k: (reverse(k), jax.vmap(jax.random.bits)(k)))(  # noqa: B023
                jax.random.split(jax.random.key(0), 4)
            )


def test_donation():
    """Fails on an output written over the input that it is still read from."""
    x, want = ROWS.x(), ROWS.expected(ROWS.x(), LENGTHS)
    donated = jnp.array(x)
    y = jax.jit(ROWS.call, donate_argnums=0)(donated, LENGTHS)
    assert_same_bits(y, want)
    assert donated.is_deleted()


@pytest.mark.parametrize("order", ((2, 0, 1), (1, 2, 0), (2, 1, 0)))
def test_custom_layouts(order):
    """Fails on strides of another layout than the array's own."""
    x, want = ROWS.x(), ROWS.expected(ROWS.x(), LENGTHS)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = Format(Layout(order), device)
    laid_out = jax.device_put(x, layout)
    assert_same_bits(reverse_sequence(laid_out, LENGTHS), want)
    call = jax.jit(
        lambda x: reverse_sequence(x, jnp.asarray(LENGTHS)),
        in_shardings=layout,
        out_shardings=layout,
    )
    y = call(laid_out)
    assert y.format.layout.major_to_minor == order
    assert_same_bits(y, want)


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

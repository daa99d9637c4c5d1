"""Every transformation of one device: values and gradients equal the reference.

The reversal is its own transpose, so the gradient is right exactly where the cotangent
comes back as the reference reverses it.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_revseg import reverse_sequence
from tests.cases import SMALL, Case, assert_same_bits, random_bits

XS = [case.x() for case in SMALL]
SEGMENTS = [case.segments() for case in SMALL]
CTS = [random_bits(np.random.default_rng(1), (4, 7, 2), "float32") for _ in SMALL]


def scan(f):
    def three_times(x, segments):  # Twice is nothing, three times is once.
        stacked = jnp.stack([segments] * 3)
        return lax.scan(lambda x, segments: (f(x, segments), None), x, stacked)[0]

    return three_times


def scan_over_constant_segments(f):
    return lambda x, segments: lax.scan(
        lambda x, _: (f(x, segments), None), x, length=3
    )[0]


def fori(f):
    return lambda x, s: lax.fori_loop(0, 3, lambda _, x: f(x, s), x)


def rows(f):
    """Row by row, the segments sliced from an array on the device."""
    return lambda x, s: lax.map(lambda row: f(row[0][None], row[1][None])[0], (x, s))


def cond(f):
    return lambda x, s: lax.cond(s.sum() > -1, f, lambda x, s: jnp.zeros_like(x), x, s)


def switch(f):
    return lambda x, s: lax.switch(
        jnp.clip(s.sum(), 1, 1), [lambda x, s: x, f, lambda x, s: -x], x, s
    )


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x, s: (f(x, s), s), lambda s, ct: (f(ct, s), None))
    return g


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), f(tangents[0], primals[1])))
    return g


def linearized(f):
    return lambda x, s: jax.linearize(lambda x: f(x, s), jnp.zeros_like(x))[1](x)


def transposed(f):
    return lambda x, s: jax.linear_transpose(lambda x: f(x, s), x)(x)[0]


def remat(policy):
    return lambda f: jax.checkpoint(f, policy=policy)


policies = jax.checkpoint_policies
WRAPPERS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "jit-of-jit": lambda f: jax.jit(jax.jit(f)),
    "scan": scan,
    "scan-constant": scan_over_constant_segments,
    "fori": fori,
    "map": rows,
    "cond": cond,
    "switch": switch,
    "custom_vjp": custom_vjp,
    "custom_jvp": custom_jvp,
    "linearize": linearized,
    "linear_transpose": transposed,
    "remat": jax.checkpoint,
    "remat-nothing": remat(policies.nothing_saveable),
    "remat-everything": remat(policies.everything_saveable),
    "remat-dots": remat(policies.dots_with_no_batch_dims_saveable),
    "remat-scan": lambda f: jax.checkpoint(scan(f)),
    "scan-remat": lambda f: scan(jax.checkpoint(f)),
    "cond-in-scan": lambda f: scan(cond(f)),
    "vmap-of-cond": lambda f: (
        lambda x, s: jax.vmap(lambda x, s: cond(f)(x[None], s[None])[0])(x, s)
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_values_and_gradients(wrapper):
    """Fails on a rule that is missing, or that reverses by other segments."""

    def run(xs, segments, cts):
        outs = []
        for case, x, s, ct in zip(SMALL, xs, segments, cts, strict=True):
            y, vjp = jax.vjp(lambda x: wrapper(case.call)(x, s), x)  # noqa: B023
            outs.append((y, *vjp(ct)))
        return outs

    outs = jax.jit(run)(XS, SEGMENTS, CTS)  # One program: compiling takes the time.
    for case, x, s, ct, (y, x_bar) in zip(SMALL, XS, SEGMENTS, CTS, outs, strict=True):
        assert_same_bits(y, case.expected(x, s), case.name)
        assert_same_bits(x_bar, case.expected(ct, s), case.name)


@jax.jit
def while_three_times(xs, segments):
    def body(carry):
        step, *xs = carry
        calls = zip(SMALL, xs, segments, strict=True)
        return step + 1, *(case.call(x, s) for case, x, s in calls)

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, *xs))[1:]


def test_while_loop():
    """Fails if the tangent is wrong. A loop of unknown length has no reverse mode."""
    outs, tangents = jax.jvp(lambda xs: while_three_times(xs, SEGMENTS), (XS,), (CTS,))
    for case, x, s, ct, y, dy in zip(
        SMALL, XS, SEGMENTS, CTS, outs, tangents, strict=True
    ):
        assert_same_bits(y, case.expected(x, s), case.name)
        assert_same_bits(dy, case.expected(ct, s), case.name)


def test_while_loop_on_segments():
    """Fails on lengths kept from an earlier turn of the loop."""
    x = np.arange(12.0, dtype=np.float32).reshape(2, 6)

    @jax.jit
    def run(x, lengths):
        def body(carry):
            x, lengths = carry
            return reverse_sequence(x, lengths), lengths + 1

        return lax.while_loop(lambda carry: carry[1][0] < 4, body, (x, lengths))

    expected, lengths = x, np.array([2, 3])
    case = Case("loop", x.shape)
    for step in range(2):
        expected = case.expected(expected, lengths + step)
    chex.assert_trees_all_equal(run(x, lengths)[0], expected)

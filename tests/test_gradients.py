"""Every derivative is the reversal itself, on the tangent or on the cotangent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.jet import jet

from jax_revseg import reverse_segment_order, reverse_segments_p, reverse_sequence
from jax_revseg._compat import ad
from jax_revseg._layout import Layout
from tests.cases import LAYOUTS, SMALL, Case, assert_same_bits, random_bits

FLOATS = ("bfloat16", "float16", "complex64", "float8_e4m3fn", "float32")
# Different axes in each, and each kind of float.
GROUP = (
    *SMALL,
    *(
        Case(f"{layout}-{dtype}", (7, 3, 4), dtype, layout, axis=0, batch_axes=(2,))
        for layout, dtype in zip(LAYOUTS, FLOATS, strict=True)
    ),
    Case("all-cut", (4, 7, 2), layout="packed", lengths="over"),
)


def test_values():
    """Fails if a derivative is another permutation, is summed, or its bits change."""
    rng = np.random.default_rng(0)
    xs, segments = [c.x() for c in GROUP], [c.segments() for c in GROUP]
    # Also NaNs with payloads: nothing may be multiplied by 0 or by 1, or added.
    others = [random_bits(rng, c.shape, c.dtype) for c in GROUP]

    @jax.jit  # One program, since compiling is what takes the time.
    def run(xs, segments, others):
        outs = []
        for case, x, s, other in zip(GROUP, xs, segments, others, strict=True):
            reverse = functools.partial(case.call, segments=s)
            out, pullback = jax.vjp(reverse, x)
            (transposed,) = jax.linear_transpose(reverse, x)(other)
            _, pushed = jax.jvp(reverse, (x,), (other,))
            _, pushforward = jax.linearize(reverse, x)
            outs.append((out, *pullback(other), transposed, pushed, pushforward(other)))
        return outs

    for case, x, s, other, (out, *derivatives) in zip(
        GROUP, xs, segments, others, run(xs, segments, others), strict=True
    ):
        assert_same_bits(out, case.expected(x, s), case.name)
        for derivative in derivatives:
            assert_same_bits(derivative, case.expected(other, s), case.name)


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x, s: (f(x, s), s), lambda s, ct: (f(ct, s), None))
    return g


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), f(tangents[0], primals[1])))
    return g


def switch(f):
    branches = [lambda x, s: x, f, lambda x, s: -x]
    return lambda x, s: lax.switch(jnp.clip(s.sum(), 1, 1), branches, x, s)


# What the random stacks of test_fuzz.py have not. Three times is once.
WRAPPERS = {
    "fori": lambda f: lambda x, s: lax.fori_loop(0, 3, lambda _, x: f(x, s), x),
    "switch": switch,
    "custom_vjp": custom_vjp,
    "custom_jvp": custom_jvp,
    "policy": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def test_inside_loops_branches_and_custom_rules():
    """Fails on a rule that is missing, or that reverses by other segments."""
    pairs = [*zip(WRAPPERS.values(), SMALL, strict=True)]
    x, segments = SMALL[0].x(), [case.segments() for case in SMALL]

    @jax.jit
    def run(x, segments):
        outs = []
        for (wrap, case), s in zip(pairs, segments, strict=True):
            y, pullback = jax.vjp(lambda x: wrap(case.call)(x, s), x)  # noqa: B023
            outs.append((y, *pullback(y)))
        return outs

    for case, s, (y, back) in zip(SMALL, segments, run(x, segments), strict=True):
        assert_same_bits(y, case.expected(x, s), case.name)
        assert_same_bits(back, x, case.name)


def test_while_loop():
    """Fails on a wrong tangent, or on lengths kept from an earlier turn of the loop.

    A loop of unknown length has no reverse mode.
    """
    case, lengths = Case("loop", (2, 6)), np.array([2, 3])
    x, dx = np.random.default_rng(0).standard_normal((2, 2, 6)).astype(np.float32)

    def turn(carry):
        return reverse_sequence(*carry), carry[1] + 1

    def run(x):
        return lax.while_loop(lambda carry: carry[1][0] < 4, turn, (x, lengths))[0]

    for out, given in zip(jax.jvp(jax.jit(run), (x,), (dx,)), (x, dx), strict=True):
        once = case.expected(given, lengths)
        assert_same_bits(out, case.expected(once, lengths + 1))


def test_padding_value():
    """Fails if a gradient reaches overwritten padding, or not the padding value."""
    xs, segments = [c.x() for c in SMALL], [c.segments() for c in SMALL]
    cts = [
        np.random.default_rng(0).integers(1, 9, c.shape).astype(c.dtype) for c in SMALL
    ]

    @jax.jit
    def run(xs, segments, cts):
        return [
            jax.vjp(lambda x, v, c=c, s=s: c.call(x, s, padding_value=v), x, 2.0)[1](ct)
            for c, x, s, ct in zip(SMALL, xs, segments, cts, strict=True)
        ]

    results = zip(SMALL, segments, cts, run(xs, segments, cts), strict=True)
    for case, s, ct, (to_x, to_value) in results:
        is_padding = case.expected(np.zeros_like(ct), s, padding_value=1) == 1
        assert is_padding.any() == (case.layout != "starts")
        np.testing.assert_array_equal(to_x, case.expected(ct, s, padding_value=0))
        np.testing.assert_array_equal(to_value, ct[is_padding].sum())


@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.name)
def test_jacobians(case):
    """Fails if a Jacobian is not the permutation's matrix, or a second derivative, in
    any order of the modes, is wrong."""
    segments, modes = jnp.asarray(case.segments()[:1]), (jax.jacfwd, jax.jacrev)

    def f(x):
        return case.call(x[None], segments)[0]

    def squares(x):  # sum of x[i] * x[p[i]]: its Hessian is P + P transposed.
        return f(x) @ x

    @jax.jit
    def run(x):
        hessians = [a(b(squares))(x) for a in modes for b in modes]
        return [mode(f)(x) for mode in modes], hessians

    row = case.expected(np.arange(7)[None], case.segments()[:1])[0]
    matrix = np.eye(7, dtype=np.float32)[row]
    jacobians, hessians = run(jnp.arange(7.0))
    for jacobian in jacobians:
        assert_same_bits(jacobian, matrix)
    for hessian in hessians:
        assert_same_bits(hessian, matrix + matrix.T)


def test_integers():
    """Fails if integers or lengths have a gradient of another dtype than float0."""
    case, x = SMALL[0], np.arange(56).reshape(4, 7, 2)
    segments, nothing = case.segments(), np.zeros(x.shape, jax.dtypes.float0)
    out, tangent = jax.jvp(lambda x: case.call(x, segments), (x,), (nothing,))
    assert_same_bits(out, case.expected(out.dtype.type(x), segments))
    (ct,) = jax.vjp(lambda x: case.call(x, segments), x)[1](nothing)
    of_lengths = jax.grad(lambda s: case.call(1.0 * x, s).sum(), allow_int=True)
    to_lengths = of_lengths(jnp.asarray(segments))
    for derivative, of in ((tangent, x), (ct, x), (to_lengths, segments)):
        assert derivative.dtype == jax.dtypes.float0 and derivative.shape == of.shape


def test_no_cotangent():
    """Fails if the transpose rule, which JAX may call so, takes no symbolic zero."""
    aval, layout = jax.typeof(jnp.zeros((2, 7))), Layout("padded", 1, (0,))
    rule = ad.primitive_transposes[reverse_segments_p]
    x, lengths = ad.UndefinedPrimal(aval), jnp.array([3, 7])
    to_x, to_lengths = rule(ad.Zero(aval), x, lengths, layout=layout)
    assert type(to_x) is ad.Zero and to_lengths is None


def test_taylor_mode():
    """Fails if terms of a Taylor series are not reversed along with the value."""
    case, lengths = Case("jet", (2, 7)), np.array([3, 7])
    x = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    terms = [6 * np.round(9 * x + k) for k in range(3)]  # jet divides by factorials.
    out, series = jet(lambda x: reverse_sequence(x, lengths), (x,), (terms,))
    for got, term in zip((out, *series), (x, *terms), strict=True):
        assert_same_bits(got, case.expected(term, lengths))


def test_segment_order():
    """Fails if the gradient of the order of segments is not the inverse permutation."""
    cotangent = np.arange(6, dtype=np.float32)
    _, vjp = jax.vjp(
        lambda x: reverse_segment_order(x, jnp.array([1, 3]))[0], cotangent
    )
    assert_same_bits(vjp(cotangent)[0], cotangent[[3, 0, 1, 2, 4, 5]])

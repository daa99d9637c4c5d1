"""Random reversals, and random stacks of transformations around them (hypothesis).

A reversal is linear in x, so a transformed one is still described by two NumPy
functions: what it does to x, and what its transpose does to a cotangent. Each layer of
a stack turns such a pair into the next one, beside the JAX function that it tests.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from tests.cases import DTYPES, LAYOUTS, WIDE, Case, bit_width, random_bits

_COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck))
# The same examples each time, so that a change is to blame for what fails.
settings.register_profile("normal", max_examples=20, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=20_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "normal"))

NARROW = tuple(dtype for dtype in DTYPES if dtype not in WIDE)
LENGTHS_DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32")


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...] = NARROW) -> Case:
    """A reversal of any rank up to 4, with its axes in any order."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    axes = draw(st.permutations(range(len(shape))))
    layout = draw(st.sampled_from(LAYOUTS))
    return Case(
        "fuzz",
        shape,
        draw(st.sampled_from(dtypes)),
        layout,
        axis=axes[0],
        batch_axes=tuple(axes[1 : draw(st.integers(1, len(shape)))]),
        count=draw(st.integers(0, 4)),
        lengths_dtype=draw(st.sampled_from(LENGTHS_DTYPES)),
        padding_id=draw(st.sampled_from((None, 0, 1))) if layout == "ids" else None,
    )


def segments_shape(case: Case) -> tuple[int, ...]:
    k, t = case.count, case.size
    rest = dict(padded=(), packed=(k,), ids=(t,), starts=(t,), offsets=(k + 1,))
    return (*case.batch_shape, *rest[case.layout])


def segments(case: Case, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Few ids, or lengths near the size of the axis and at their dtype's limits."""
    if case.layout == "starts":
        return hnp.arrays(bool, shape)
    if case.layout == "ids":
        return hnp.arrays(case.lengths_dtype, shape, elements=st.integers(0, 2))
    info = np.iinfo(case.lengths_dtype)
    elements = st.integers(max(-2, info.min), case.size + 2) | st.just(int(info.max))
    if case.layout != "offsets":  # Whose difference to the largest one would wrap.
        elements |= st.just(int(info.min))
    return hnp.arrays(case.lengths_dtype, shape, elements=elements)


@dataclass(frozen=True)
class Linear:
    """A function of x and segments that is linear in x, and what it must do."""

    call: Callable[[Any, Any], jax.Array]
    forward: Callable[[np.ndarray, np.ndarray], np.ndarray]
    transpose: Callable[[np.ndarray, np.ndarray], np.ndarray]
    dtype: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    segments_shape: tuple[int, ...]
    # JAX has no `linear_transpose` of a cond that vmap has made a select.
    transposes: bool = True


def base(case: Case, padding_value: Any) -> Linear:
    def call(x, s):
        return case.call(x, s, padding_value=padding_value)

    def numpy(x, s):
        # Zeros in the padding, like everything else, stay where they are: the map is
        # its own transpose with them too.
        return case.expected(x, s, padding_value)

    shape = case.shape
    return Linear(call, numpy, numpy, case.dtype, shape, shape, segments_shape(case))


def take(x: np.ndarray, i: int, axis: int | None) -> np.ndarray:
    return x if axis is None else np.take(x, i, axis)


def insert(shape: tuple[int, ...], size: int, axis: int | None) -> tuple[int, ...]:
    if axis is None:
        return shape
    axis %= len(shape) + 1
    return (*shape[:axis], size, *shape[axis:])


def mapped(f: Linear, call: Callable, size: int, axes: tuple) -> Linear:
    """What any way to map `f` over a new axis must do: a loop and a stack."""
    x_axis, s_axis, out = axes

    def forward(x, s):
        rows = [f.forward(take(x, i, x_axis), take(s, i, s_axis)) for i in range(size)]
        return np.stack(rows, out)

    def transpose(ct, s):
        rows = [f.transpose(take(ct, i, out), take(s, i, s_axis)) for i in range(size)]
        return np.sum(rows, 0) if x_axis is None else np.stack(rows, x_axis)

    return replace(
        f,
        call=call,
        forward=forward,
        transpose=transpose,
        x_shape=insert(f.x_shape, size, x_axis),
        y_shape=insert(f.y_shape, size, out),
        segments_shape=insert(f.segments_shape, size, s_axis),
    )


def vmap(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    def axis(rank):
        return draw(st.integers(-rank - 1, rank))

    which = draw(st.sampled_from(("both", "x", "segments")[: 2 + sums]))
    x_axis = None if which == "segments" else axis(len(f.x_shape))
    s_axis = None if which == "x" else axis(len(f.segments_shape))
    out = axis(len(f.y_shape))
    call = jax.vmap(f.call, (x_axis, s_axis), out)
    return mapped(f, call, draw(st.integers(1, 3)), (x_axis, s_axis, out))


def scan_over(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    x_axis, s_axis = draw(st.sampled_from(((0, 0), (0, None), (None, 0))[: 2 + sums]))

    def call(x, s):
        def step(_, row):
            return 0, f.call(row.get("x", x), row.get("s", s))

        rows = {"x": x} if s_axis is None else {"s": s}
        return lax.scan(step, 0, rows | ({} if x_axis is None else {"x": x}))[1]

    return mapped(f, call, draw(st.integers(1, 3)), (x_axis, s_axis, 0))


def scan_carry(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    if f.x_shape != f.y_shape:
        return scan_over(draw, f, sums)
    times = draw(st.integers(0, 3))

    def call(x, s):
        return lax.scan(lambda x, _: (f.call(x, s), None), x, length=times)[0]

    def repeat(once):
        return lambda x, s: functools.reduce(lambda x, _: once(x, s), range(times), x)

    return replace(
        f, call=call, forward=repeat(f.forward), transpose=repeat(f.transpose)
    )


def gradient(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    x = jax.ShapeDtypeStruct(f.x_shape, f.dtype)
    alone = f.transposes and draw(st.booleans())

    def call(ct, s):
        if alone:
            return jax.linear_transpose(lambda x: f.call(x, s), x)(ct)[0]
        primal = jnp.ones(x.shape, x.dtype)
        return jax.vjp(lambda x: f.call(x, s), primal)[1](ct)[0]

    return replace(
        f,
        call=call,
        forward=f.transpose,
        transpose=f.forward,
        x_shape=f.y_shape,
        y_shape=f.x_shape,
    )


def tangent(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    def jvp(x, s):
        return jax.jvp(lambda x: f.call(x, s), (x,), (x,))[1]

    def linearize(x, s):
        return jax.linearize(lambda x: f.call(x, s), x)[1](x)

    return replace(f, call=draw(st.sampled_from((jvp, linearize))))


def cond(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    never = lambda x, s: jnp.zeros(f.y_shape, f.dtype)  # noqa: E731

    def call(x, s):
        return lax.cond(jnp.all(s == s), f.call, never, x, s)

    return replace(f, call=call, transposes=False)


def wrap(draw: st.DrawFn, f: Linear, sums: bool) -> Linear:
    wrapper = draw(st.sampled_from((jax.jit, jax.checkpoint)))
    return replace(f, call=wrapper(f.call))


ANY_DTYPE = (wrap, vmap, scan_over, scan_carry, cond)
INEXACT = (*ANY_DTYPE, gradient, tangent)


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Linear, np.ndarray, np.ndarray, str]:
    """A stack of 2 to 4 transformations, its operands, and what to call it."""
    # Either random bits, which no sum keeps, or small integers and sums as well.
    sums = draw(st.booleans())
    case = draw(cases(("float32",) if sums else NARROW))
    inexact = jnp.issubdtype(case.dtype, jnp.inexact)
    zero = None if case.dtype == "float8_e8m0fnu" else 0  # That has no zero.
    f = base(case, draw(st.sampled_from((None, zero))))
    layers = INEXACT if inexact else ANY_DTYPE
    # On JAX 0.7.2 cond loses half of an int4's transpose.
    layers = [f for f in layers if f is not cond or bit_width(case.dtype) >= 8]
    # Drawn with `st.lists`, most stacks would be empty, or one layer alone.
    layers = draw(st.permutations(layers * 2))[: draw(st.integers(2, 4))]
    for layer in layers:
        f = layer(draw, f, sums)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if sums:
        x = rng.integers(-9, 10, f.x_shape).astype(np.float32)
    else:
        x = random_bits(rng, f.x_shape, case.dtype)
        if inexact and bit_width(case.dtype) <= 16:
            # XLA:CPU itself changes bits of small floats: `x[::-1]` in a scan does.
            with np.errstate(invalid="ignore"):
                x[np.isnan(x)] = 1
                if case.dtype == "float8_e5m2fnuz":
                    x[np.abs(x.astype(np.float32)) < 2**-14] = 1
    names = " of ".join(layer.__name__ for layer in reversed(layers))
    return f, x, draw(segments(case, f.segments_shape)), f"{names} of {case}"

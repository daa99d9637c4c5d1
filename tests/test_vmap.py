"""vmap over any axes of either operand, against a Python loop over slices."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest

from tests.cases import Case, assert_same_bits
from tests.meshes import with_gradients
from tests.strategies import take

LAYOUTS = ("padded", "packed", "ids")  # Offsets are packed lengths by then.


def loop(case, x, segments, levels):
    """The reference under Python loops; `levels` are (x axis, segments axis, out)."""
    if not levels:
        return case.expected(x, segments)
    (x_dim, segments_dim, out_dim, size), *inner = levels
    rows = [(take(x, i, x_dim), take(segments, i, segments_dim)) for i in range(size)]
    return np.stack([loop(case, *row, inner) for row in rows], out_dim)


def mapped(case, levels):
    """The public call under as many vmaps."""
    f = case.call
    for x_dim, segments_dim, out_dim, size in reversed(levels):
        f = jax.vmap(f, (x_dim, segments_dim), out_dim, axis_size=size)
    return f


def operands(case, levels, rng):
    """Operands of the outermost call, whose axes the levels then take away."""
    x, segments = case.x(), case.segments()
    for x_dim, segments_dim, _, size in reversed(levels):
        if x_dim is not None:
            x = rng.permuted(np.stack([x] * size, x_dim))
        if segments_dim is not None:
            # Other rows' lengths are as good, and sums stay within the axis.
            rolled = [np.roll(segments, i) for i in range(size)]
            segments = np.stack(rolled, segments_dim)
    return x, segments


def base_cases(layout):
    """One row without batch axes; a time-major batch. Sizes all differ."""
    make = partial(Case, layout=layout, dtype="int32", count=2, padding_id=2)
    return (
        make("row", (5,), axis=0, batch_axes=()),
        make("time-major", (5, 2, 3), axis=0, batch_axes=(2,)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_axis(layout):
    """Fails if an axis of an operand or of the result is not the one asked for."""
    combinations = []
    for case in base_cases(layout):
        x_dims = (None, *range(len(case.shape) + 1))
        segments_dims = (None, *range(len(case.batch_axes) + (layout != "padded") + 1))
        pairs = itertools.product(x_dims, segments_dims)
        for i, (x_dim, segments_dim) in enumerate(pairs):
            if i > 0:  # That is, not both None.
                out_dim = i % (len(case.shape) + 1)  # Which JAX itself moves.
                combinations.append((case, [(x_dim, segments_dim, out_dim, 4)]))
    # Mapped behind two batch axes, whose order then counts.
    planes = Case("planes", (2, 3, 5), layout=layout, axis=2, batch_axes=(0, 1))
    last = len(planes.segments().shape)
    combinations += [(planes, [(1, last, 0, 4)]), (planes, [(None, last, 3, 4)])]
    # A rule on what it itself returned.
    both, only_x, only_segments = (1, 1, 2, 2), (2, None, 0, 2), (None, 0, 1, 2)
    for levels in ((both, only_x, only_segments), (only_segments, both, only_x)):
        combinations.append((case, list(levels)))
    rng = np.random.default_rng(0)
    given = [operands(case, levels, rng) for case, levels in combinations]

    @jax.jit  # One program, since compiling is what takes the time.
    def run(given):
        pairs = zip(combinations, given, strict=True)
        return [mapped(case, levels)(*both) for (case, levels), both in pairs]

    for (case, levels), both, out in zip(combinations, given, run(given), strict=True):
        expected = loop(case, *both, levels)
        assert_same_bits(out, expected, f"{case.name} under {levels}")


def test_gradient_of_an_operand_that_is_not_mapped():
    """Fails if it is not summed over the mapped axis."""
    rng = np.random.default_rng(0)
    for layout in LAYOUTS:
        case = base_cases(layout)[1]
        _, s = operands(case, [(None, 0, 0, 4)], rng)
        # Small whole numbers as floats: their sums are exact.
        x = rng.integers(0, 9, case.shape).astype(np.float32)
        ct = rng.integers(0, 9, (4, *case.shape)).astype(np.float32)
        run = jax.jit(partial(with_gradients, jax.vmap(case.call, (None, 0))))
        rows = [case.expected(*row) for row in zip(ct, s, strict=True)]
        assert_same_bits(run(x, s, ct)[1], np.sum(rows, 0), layout)

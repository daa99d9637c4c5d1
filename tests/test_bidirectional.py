"""bidirectional: reverse, run, reverse back, merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import _reference, bidirectional
from tests.cases import assert_same_bits

LENGTHS = np.array([0, 1, 3, 5])


def sums(x):
    """A layer whose every step depends on all steps before it, in whole numbers."""
    return jnp.cumsum(x, 1)


def reverse(x, axis=1, batch_axes=(0,)):
    return _reference.reverse(
        x, LENGTHS, axis=axis, batch_axes=batch_axes, layout="padded"
    )


def numbers(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 99, shape, np.int32)


def test_values():
    """A direction is missing, stays reversed, or sees padding before a valid step."""
    x = numbers((4, 5, 2))
    run = bidirectional(sums, lambda x: 2 * jnp.cumsum(x, 1))
    back = reverse(2 * np.cumsum(reverse(x), 1, dtype=np.int32))
    expected = np.concatenate([np.cumsum(x, 1, dtype=np.int32), back], -1)
    assert_same_bits(run(x, LENGTHS), expected)
    assert_same_bits(jax.jit(run)(x, LENGTHS), expected)
    for n, length in enumerate(LENGTHS):  # By eye: sums from the end of the row.
        row = 2 * x[n, :length][::-1].cumsum(0)[::-1]
        np.testing.assert_array_equal(back[n, :length], row)


def test_merge():
    """merge does not get the two results, in this order."""
    x = numbers((4, 5, 2))
    got = bidirectional(lambda x: x, lambda x: -x, merge=lambda a, b: (a, b))(
        x, LENGTHS
    )
    assert_same_bits(got[0], x)
    assert_same_bits(got[1], -x)
    total = bidirectional(sums, sums, merge=jnp.add)(x, LENGTHS)
    expected = np.cumsum(x, 1) + reverse(np.cumsum(reverse(x), 1))
    assert_same_bits(total, expected.astype(np.int32))


@pytest.mark.parametrize("axis, batch_axis", ((0, 1), (-3, -2), (0, None)))
def test_time_major(axis, batch_axis):
    """Axes count for x only, and not for outputs of another rank."""
    x = numbers((5, 4, 2))

    def heads(x):  # One axis more than x has.
        return jnp.stack([jnp.cumsum(x, 0), 2 * x], -1)

    got = bidirectional(heads, heads, merge=lambda a, b: b)(
        x, LENGTHS, axis=axis, batch_axis=batch_axis
    )
    flipped = reverse(x, 0, (1,))
    expected = np.stack([np.cumsum(flipped, 0), 2 * flipped], -1)
    assert_same_bits(got, reverse(expected, 0, (1,)).astype(np.int32))


def test_pytrees():
    """A leaf of the input or of the output is left unreversed, or lost."""
    x = {"a": numbers((4, 5, 2)), "b": [numbers((4, 5), 1)]}

    def layer(x):
        return sums(x["a"]), {"c": sums(x["b"][0])[..., None]}

    a, c = bidirectional(layer, layer)(x, LENGTHS)
    for got, given in ((a, x["a"]), (c["c"], x["b"][0][..., None])):
        back = reverse(np.cumsum(reverse(given), 1))
        expected = np.concatenate([np.cumsum(given, 1), back], -1)
        assert_same_bits(got, expected.astype(np.int32))


def test_gradients():
    """A gradient from padding reaches a valid step, or one direction gets none."""
    x = numbers((4, 5, 2)).astype(np.float32)
    valid = np.arange(5) < LENGTHS[:, None]
    run = bidirectional(sums, sums)

    @jax.jit
    def gradient(x):
        def loss(x):
            return (run(x, LENGTHS) * valid[..., None]).sum()

        return jax.grad(loss)(x)

    # A step counts once for each valid step after it, and once for each before it.
    expected = np.where(valid, LENGTHS[:, None] + 1, 0).astype(np.float32)
    assert_same_bits(gradient(x), np.stack([expected, expected], -1))


def test_one_sequence():
    """A scalar length is no length of a single sequence without a batch."""
    x = numbers((5, 2))
    layer = bidirectional(lambda x: x, lambda x: jnp.cumsum(x, 0), merge=lambda a, b: b)
    expected = x.copy()
    expected[:3] = np.cumsum(x[2::-1], 0)[::-1]
    expected[3:] = np.cumsum(x, 0)[3:]
    assert_same_bits(layer(x, 3), expected)


def test_errors():
    """The message names a function that the user did not call, or no argument."""
    x, run = numbers((4, 5, 2)), bidirectional(sums, sums)
    for call, error, pattern in (
        (lambda: run([], [1]), ValueError, r"x is \[\].*at least 1 array"),
        (lambda: run("abc", [1]), TypeError, "x must be an array.*type str"),
        (lambda: run(x, [1, 2]), ValueError, r"sizes \(4,\).*lengths has \(2,\)"),
        (lambda: run(x, [6] * 4), ValueError, r"lengths\[0\] is 6.*0 and 5"),
        (lambda: run(x, [1.0] * 4), TypeError, "lengths has dtype float64"),
        (lambda: run(x, LENGTHS, axis=3), ValueError, "axis is 3.*rank 3"),
    ):
        with pytest.raises(error, match=f"(?s)^bidirectional: .*{pattern}"):
            call()
    other = {"a": x, "b": x[:3]}
    tree = bidirectional(lambda x: x["a"], lambda x: x["a"])
    with pytest.raises(ValueError, match=r"\(3,\).*lengths has \(4,\)"):
        tree(other, LENGTHS)

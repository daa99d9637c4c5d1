"""bidirectional: reverse, run, reverse back, merge."""

import pickle
import sys
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial, keystr, tree_leaves_with_path

from jax_revseg import _reference, associative_scan_segments, bidirectional
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
    """Fails if a direction is missing, stays reversed, or sees padding before a valid
    step."""
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
    """Fails if merge does not get the two results, in this order."""
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
    """Fails if axes count from the end of an output that has another rank than x."""
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
    """Fails if a leaf of the input or of the output is left unreversed, or lost."""
    x = {"a": numbers((4, 5, 2)), "b": [numbers((4, 5), 1)]}

    def layer(x):
        return sums(x["a"]), {"c": sums(x["b"][0])[..., None]}

    a, c = bidirectional(layer, layer)(x, LENGTHS)
    for got, given in ((a, x["a"]), (c["c"], x["b"][0][..., None])):
        back = reverse(np.cumsum(reverse(given), 1))
        expected = np.concatenate([np.cumsum(given, 1), back], -1)
        assert_same_bits(got, expected.astype(np.int32))


IDS = np.array([[4, 4, 1, 1, 1], [0, 2, 2, 0, 2], [3] * 5, [0] * 5])
OFFSETS = np.array([[0, 2, 5], [0, 0, 3], [0, 5, 5], [0, 0, 0]])


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize(
    "packed",
    (
        dict(segment_ids=IDS),
        dict(segment_ids=IDS, padding_id=0),
        dict(cu_seqlens=OFFSETS),
    ),
    ids=lambda packed: "-".join(packed),
)
def test_packed(packed, jit):
    """Fails if segments move, or a layer that restarts at the same ids restarts
    elsewhere."""
    x = numbers((4, 5, 2))

    def layer(x):
        return associative_scan_segments(jnp.add, x, **packed)

    run = bidirectional(layer, layer, merge=lambda *both: both)
    forward, backward = (jax.jit(run, static_argnames="padding_id") if jit else run)(
        x, **packed
    )
    ids, offsets = packed.get("segment_ids"), packed.get("cu_seqlens")
    for n, row in enumerate(x):
        if ids is not None:
            bounds = _reference.id_bounds(ids[n], packed.get("padding_id"))
        else:
            bounds = _reference.packed_bounds(np.diff(offsets[n]), 5)
        for start, end in bounds:
            values = row[start:end]
            np.testing.assert_array_equal(forward[n, start:end], values.cumsum(0))
            from_end = values[::-1].cumsum(0)[::-1]
            np.testing.assert_array_equal(backward[n, start:end], from_end)


def test_gradients():
    """Fails if a gradient from padding reaches a valid step, or one direction gets
    none."""
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
    """Fails if a scalar length is refused for one sequence without a batch."""
    x = numbers((5, 2))
    layer = bidirectional(lambda x: x, lambda x: jnp.cumsum(x, 0), merge=lambda a, b: b)
    expected = x.copy()
    expected[:3] = np.cumsum(x[2::-1], 0)[::-1]
    expected[3:] = np.cumsum(x, 0)[3:]
    assert_same_bits(layer(x, 3), expected)


def test_errors():
    """Fails if the message names a function that the user did not call, or no
    argument."""
    x, run = numbers((4, 5, 2)), bidirectional(sums, sums)
    for call, error, pattern in (
        (lambda: run([], [1]), ValueError, r"x is \[\].*give at least 1"),
        (lambda: run("abc", [1]), TypeError, "x must be an array.*type str"),
        (lambda: run(x, [1, 2]), ValueError, r"sizes \(4,\).*lengths has \(2,\)"),
        (lambda: run(x, [6] * 4), ValueError, r"lengths\[0\] is 6.*0 and 5"),
        (lambda: run(x, [1.0] * 4), TypeError, "lengths has dtype float64"),
        (lambda: run(x, LENGTHS, axis=3), ValueError, "axis is 3.*rank 3"),
    ):
        with pytest.raises(error, match=f"(?s)^bidirectional: .*{pattern}"):
            call()
    for packed in (dict(segment_ids=IDS[:3]), dict(cu_seqlens=OFFSETS[:3])):
        name = next(iter(packed))
        with pytest.raises(ValueError, match=f"(?s)^bidirectional: .*{name} has"):
            run(x, **packed)
    with pytest.raises(ValueError, match="^bidirectional: .*exactly one of"):
        run(x)
    other = {"a": x, "b": x[:3]}
    tree = bidirectional(lambda x: x["a"], lambda x: x["a"])
    with pytest.raises(ValueError, match=r"\(3,\).*lengths has \(4,\)"):
        tree(other, LENGTHS)


@pytest.mark.parametrize("side", ("forward", "backward"))
@pytest.mark.parametrize(
    "carry, where",
    (
        (lambda x: (x[:, -1], x), r"\[0\] of shape \(4, 2\)"),
        (lambda x: {"ys": x, "h": x[:3]}, r"\['h'\] of shape \(3, 5, 2\)"),
        (lambda x: x[0, 0], r" of shape \(2,\)"),
        (lambda x: jnp.swapaxes(x, 0, 1), r" of shape \(5, 4, 2\)"),
    ),
)
def test_final_carries_are_refused(carry, where, side):
    """Fails if a carry comes back with its features reversed, in silence."""
    layers = {"forward": sums, "backward": sums} | {side: carry}
    with pytest.raises(ValueError, match="only the outputs.* bidirectional_scan") as e:
        bidirectional(**layers)(numbers((4, 5, 2)), LENGTHS)
    message = str(e.value)
    assert message.startswith(f"bidirectional: {side} returned output"), message
    assert "sizes (4, 5) at axes (0, 1)" in message
    assert e.match(where)


def test_results_of_different_structures():
    """Fails if the message does not name the layers, or a custom merge is refused."""
    x, layers = numbers((4, 5, 2)), (lambda x: (x, x), lambda x: [x])
    with pytest.raises(
        ValueError, match=r"^bidirectional: forward.*\(\*, \*\).*\[\*\]"
    ):
        bidirectional(*layers)(x, LENGTHS)
    forward, backward = bidirectional(*layers, merge=lambda *both: both)(x, LENGTHS)
    assert len(forward) == 2 and len(backward) == 1


def scaled(scale, x):
    return scale * jnp.cumsum(x, 1)


def test_is_a_pytree_of_its_layers():
    """Fails if a layer's parameters are hidden, or a function is taken for a
    parameter."""
    x = numbers((4, 5, 2)).astype(np.float32)
    run = bidirectional(Partial(scaled, 2.0), sums, merge=add)
    leaves = tree_leaves_with_path(run)
    [(path, leaf)] = leaves
    assert keystr(path).startswith(".forward") and leaf == 2
    doubled = jax.jit(lambda run: jax.tree.map(lambda scale: 2 * scale, run))(run)
    assert doubled.merge is add and doubled.backward is sums
    expected = bidirectional(Partial(scaled, 4.0), sums, merge=add)(x, LENGTHS)
    assert_same_bits(doubled(x, LENGTHS), expected)
    gradient = jax.grad(lambda run: run(x, LENGTHS).sum())(run)
    assert gradient.forward.args[0] == np.cumsum(x, 1).sum()

    other_way = bidirectional(sums, Partial(scaled, 2.0))
    [(path, _)] = tree_leaves_with_path(other_way)
    assert keystr(path).startswith(".backward")
    assert jax.tree.map(lambda leaf: leaf, other_way).forward is sums


def test_can_be_pickled():
    """Fails if a model that holds it cannot be saved, nor sent to another process."""
    x = numbers((4, 5, 2))
    for merge in ({}, {"merge": add}):
        run = bidirectional(Partial(scaled, 2), sums, **merge)
        again = pickle.loads(pickle.dumps(run))
        assert jax.tree.structure(again) == jax.tree.structure(run)
        assert_same_bits(again(x, LENGTHS), run(x, LENGTHS))
        assert "forward=" in repr(again)


def test_asks_for_no_framework(monkeypatch):
    """Fails if Flax is imported by a library whose only dependencies are jax and
    numpy."""
    monkeypatch.delitem(sys.modules, "flax.nnx", raising=False)
    bidirectional(sums, sums)
    assert "flax.nnx" not in sys.modules

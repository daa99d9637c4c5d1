"""bidirectional: reverse, run, reverse back, merge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_revseg import _reference, associative_scan_segments, bidirectional
from tests.cases import assert_same_bits
from tests.meshes import mesh

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


def fill(x, valid):
    """What the layers get at padding: a valid step of the row, or of another row."""
    first = x[np.arange(len(x)), valid.argmax(1)]
    first[~valid.any(1)] = first[valid.any(1)][0]
    return np.where(valid[..., None], x, first[:, None])


X = numbers((4, 5, 2))
FILLED = fill(X, np.arange(5) < LENGTHS[:, None])


class Layers:
    def sums(self, x):
        return lax.cumsum(x, 1)


LAYERS = {
    "function": sums,
    "jitted": jax.jit(sums),
    "partial": partial(jnp.cumsum, axis=1),
    "partial of jitted": partial(jax.jit(lambda a, x: a * jnp.cumsum(x, 1)), 1),
    "bound method": Layers().sums,
    "jitted bound method": jax.jit(Layers().sums),
    "Partial": jax.tree_util.Partial(lambda a, x: a * jnp.cumsum(x, 1), 1),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_values(layer):
    """Fails if a direction is missing, stays reversed, or sees padding before a valid
    step; or if a kind of function is no layer."""
    back = reverse(np.cumsum(reverse(FILLED), 1, dtype=np.int32))
    expected = np.concatenate([np.cumsum(FILLED, 1, dtype=np.int32), back], -1)
    run = partial(bidirectional, layer, layer)
    assert_same_bits(run(X, LENGTHS), expected)
    assert_same_bits(jax.jit(run)(X, LENGTHS), expected)
    for n, length in enumerate(LENGTHS):  # By eye: sums from the end of the row.
        row = X[n, :length][::-1].cumsum(0)[::-1]
        np.testing.assert_array_equal(back[n, :length], row)


def test_ufuncs_and_merge():
    """Fails if merge does not get the two results, in this order."""
    for jit in (lambda f: f, jax.jit):
        run = jit(partial(bidirectional, jnp.positive, jnp.negative, merge=jnp.add))
        assert_same_bits(run(X, LENGTHS), 0 * X)
    both = bidirectional(lambda x: x, lambda x: -x, X, LENGTHS, merge=lambda *ab: ab)
    assert_same_bits(both[0], FILLED)
    assert_same_bits(both[1], -FILLED)


def test_traces_once():
    """Fails if a layer is traced again for other values, or for the same jitted layer
    in both directions."""
    traces = []

    def layer(scale, x):
        traces.append(0)
        return scale * sums(x)

    jitted = jax.jit(layer)
    for f, once in ((layer, 2), (jitted, 1)):

        @jax.jit
        def run(scale, x, n, f=f):
            x = bidirectional(partial(f, scale), partial(f, scale), x, n, merge=jnp.add)
            return bidirectional(partial(f, scale), partial(f, scale), x, n)

        traces.clear()
        for i in range(3):
            run(i, X + i, jnp.asarray(LENGTHS))
        assert len(traces) == (2 * once if f is layer else once)


@pytest.mark.parametrize("axis, batch_axis", ((0, 1), (-3, -2), (0, None)))
def test_time_major(axis, batch_axis):
    """Fails if axes count from the end of an output that has another rank than x."""

    def heads(x):  # One axis more than x has.
        return jnp.stack([jnp.cumsum(x, 0), 2 * x], -1)

    x = X.swapaxes(0, 1)
    axes = dict(axis=axis, batch_axis=batch_axis)
    got = bidirectional(heads, heads, x, LENGTHS, **axes, merge=lambda a, b: b)
    flipped = reverse(FILLED.swapaxes(0, 1), 0, (1,))
    expected = np.stack([np.cumsum(flipped, 0), 2 * flipped], -1)
    assert_same_bits(got, reverse(expected, 0, (1,)).astype(np.int32))


def test_pytrees():
    """Fails if a leaf of the input or of the output is left unreversed, or lost."""
    x = {"a": X, "b": [X[..., 0]]}

    def layer(x):
        return sums(x["a"]), {"c": sums(x["b"][0])[..., None]}

    a, c = bidirectional(layer, layer, x, LENGTHS)
    for got, given in ((a, FILLED), (c["c"], FILLED[..., :1])):
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
        dict(starts=IDS % 3 == 1),
    ),
    ids="-".join,
)
def test_packed(packed, jit):
    """Fails if segments move, or a layer that restarts at the same ids restarts
    elsewhere."""

    def layer(x):
        return associative_scan_segments(jnp.add, x, **packed)

    run = partial(bidirectional, layer, layer, merge=lambda *both: both)
    run = jax.jit(run, static_argnames="padding_id") if jit else run
    forward, backward = run(X, **packed)
    for n, row in enumerate(X):
        if "cu_seqlens" in packed:
            bounds = _reference.packed_bounds(np.diff(OFFSETS[n]), 5)
        else:
            ids = packed.get("segment_ids", np.cumsum(IDS % 3 == 1, 1))[n]
            bounds = _reference.id_bounds(ids, packed.get("padding_id"))
        for start, end in bounds:
            values = row[start:end]
            np.testing.assert_array_equal(forward[n, start:end], values.cumsum(0))
            from_end = values[::-1].cumsum(0)[::-1]
            np.testing.assert_array_equal(backward[n, start:end], from_end)


def recurrent(w, x):
    """Several leaves in, and out; no square root or logarithm of NaN has a gradient."""

    def step(h, x):
        h = jnp.tanh(h @ w["h"] + jnp.sqrt(x["a"]) @ w["x"] + jnp.log(x["b"])[:, None])
        return h, {"h": h, "k": h[:, :1] * x["b"][:, None]}

    x = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), x)
    ys = lax.scan(step, jnp.zeros((x["b"].shape[1], 2)), x)[1]
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), ys)


def valid_steps_alone(weights, x, mask):
    """What `bidirectional` must do, row by row, on the valid steps alone."""
    ys = {"h": jnp.zeros((4, 5, 4)), "k": jnp.zeros((4, 5, 2))}
    for n, row in enumerate(mask):
        for way, w in enumerate(weights):
            at = np.flatnonzero(row)[:: 1 - 2 * way]
            if not len(at):
                continue
            for name, y in recurrent(
                w, {k: a[n, at][None] for k, a in x.items()}
            ).items():
                features = slice(way * y.shape[-1], (way + 1) * y.shape[-1])
                ys[name] = ys[name].at[n, at, features].set(y[0])
    return ys


FRONT = np.arange(5) < LENGTHS[:, None]
HOLES = np.array([[0, 1, 0, 1, 1], [0] * 5, [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]], bool)
EMPTY = np.zeros((4, 5), bool)


PADDING = {
    "front, by lengths": (FRONT, "lengths", 1),
    "front, by lengths, time-major": (FRONT, "lengths", 0),
    "empty, by lengths": (EMPTY, "lengths", 1),
    "front": (FRONT, "mask", 1),
    "left": (FRONT[:, ::-1], "mask", 1),
    "holes": (HOLES, "mask", 1),
    "holes, time-major": (HOLES, "mask", 0),
    "empty": (EMPTY, "mask", 1),
}


@pytest.mark.parametrize("mask, encoding, axis", PADDING.values(), ids=PADDING)
def test_padding(mask, encoding, axis):
    """Fails if a layer sees padding, in place of a hole say, or NaN there reaches an
    output or a gradient."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (4, 5, 2)), rng.uniform(1, 2, (4, 5))
    x = {"a": np.where(mask[..., None], a, np.nan), "b": np.where(mask, b, np.nan)}
    weights = [{k: rng.normal(size=(2, 2)) for k in "hx"} for _ in range(2)]
    scale = {"h": rng.normal(size=(4, 5, 4)), "k": rng.normal(size=(4, 5, 2))}
    weights, x, scale = jax.tree.map(np.float32, (weights, x, scale))

    def swap(tree):
        return jax.tree.map(lambda a: jnp.moveaxis(a, 1, axis), tree)

    def ours(weights, x, mask):
        layers = [lambda x, w=w: swap(recurrent(w, swap(x))) for w in weights]
        of = dict(mask=swap(mask)) if encoding == "mask" else dict(lengths=mask.sum(1))
        ys = swap(bidirectional(*layers, swap(x), axis=axis, **of))
        if encoding == "mask":
            return ys
        return {k: jnp.where(mask[..., None], y, 0) for k, y in ys.items()}

    def gradient(f):
        def loss(weights, x, mask):
            ys = f(weights, x, mask)
            return sum((ys[k] * scale[k]).sum() for k in ys), ys

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    on_device = jax.tree.map(jnp.asarray, (weights, x, mask))
    want = jax.jit(lambda *args: gradient(valid_steps_alone)(*args, mask))(weights, x)
    outs = [jax.jit(gradient(ours))(*on_device)]
    if mask is HOLES:  # Eagerly, from a device and from the host.
        outs += [gradient(ours)(*on_device), gradient(ours)(weights, x, mask)]
    for got in outs:
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients():
    """Fails if a gradient from padding reaches a valid step, or one direction gets
    none."""

    @jax.jit
    def gradient(x):
        def loss(x):
            return (bidirectional(sums, sums, x, LENGTHS) * FRONT[..., None]).sum()

        return jax.grad(loss)(x)

    # A step counts once for each valid step after it, and once for each before it.
    expected = np.where(FRONT, LENGTHS[:, None] + 1, 0).astype(np.float32)
    assert_same_bits(gradient(X.astype(np.float32)), np.stack([expected] * 2, -1))


def test_one_sequence():
    """Fails if a scalar length, or a mask, is refused without a batch."""
    x = X[3]
    run = partial(
        bidirectional,
        lambda x: x,
        lambda x: jnp.cumsum(x, 0),
        x,
        merge=lambda a, b: b,
    )
    expected = np.cumsum(x[2::-1], 0, dtype=np.int32)[::-1]
    assert_same_bits(run(3)[:3], expected)
    mask = np.array([0, 1, 0, 1, 1], bool)
    expected[:] = np.cumsum(x[mask][::-1], 0)[::-1]
    assert_same_bits(run(mask=mask)[mask], expected)


@pytest.mark.parametrize("shape", ((4, 0, 2), (0, 5, 2), (4, 5, 0)))
def test_nothing(shape):
    """Fails on an axis of size 0."""
    x, mask = np.zeros(shape), np.zeros(shape[:2], bool)
    for of in (dict(mask=mask), dict(lengths=mask.sum(1)), dict(starts=mask)):
        out = bidirectional(sums, sums, x, **jax.tree.map(jnp.asarray, of))
        assert out.shape == (*shape[:2], 2 * shape[2])


IN_BLOCKS = {
    "lengths": (LENGTHS, P()),
    "cu_seqlens": (OFFSETS, P()),
    "segment_ids": (IDS, P(None, "b")),
    "starts": (IDS % 3 == 1, P(None, "b")),
}


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_sharded_segment_axis(name):
    """Fails if rows are reversed within a block, or an encoding is refused."""
    given, spec = IN_BLOCKS[name]
    x = numbers((4, 6, 2)).astype(np.float32)
    if spec != P():
        given = np.concatenate([given, given[:, -1:]], 1)
    run = partial(bidirectional, lambda x: 2 * x, lambda x: 3 * x)
    blocks = P(None, "b")
    f = jax.shard_map(
        lambda x, given: run(x, **{name: given}, axis_name="b"),
        mesh=mesh(),
        in_specs=(blocks, spec),
        out_specs=blocks,
    )
    want, got = run(x, **{name: given}), jax.jit(f)(x, jnp.asarray(given))
    valid = np.arange(6) < LENGTHS[:, None] if name == "lengths" else np.ones((4, 6))
    np.testing.assert_array_equal(got[valid > 0], want[valid > 0])


def test_no_mask_with_axis_name():
    f = jax.shard_map(
        lambda x, m: bidirectional(sums, sums, x, mask=m, axis_name="b"),
        mesh=mesh(),
        in_specs=P(None, "b"),
        out_specs=P(None, "b"),
    )
    with pytest.raises(ValueError, match="mask and axis_name='b' are both given"):
        f(jnp.ones((4, 6, 2)), jnp.ones((4, 6), bool))


def test_errors():
    """Fails if the message names a function that the user did not call, or no
    argument."""
    run = partial(bidirectional, sums, sums)
    first = lambda x: x[..., 0]  # noqa: E731
    for call, error, pattern in (
        (lambda: run([], [1]), ValueError, r"x is \[\].*give at least 1"),
        (lambda: run("abc", [1]), TypeError, "x must be an array.*type str"),
        (lambda: run(X, [1, 2]), ValueError, r"lengths has .*\(2,\).* sizes \(4,\)"),
        (lambda: run(X, [6] * 4), ValueError, r"lengths\[0\] is 6.*0 and 5"),
        (lambda: run(X, [1.0] * 4), TypeError, "lengths is .*1.0"),
        (lambda: run(X, LENGTHS, axis=3), ValueError, "axis is 3.*rank 3"),
        (lambda: run(X, segment_ids=IDS[:3]), ValueError, r"segment_ids has .*\(3, 5"),
        (lambda: run(X, cu_seqlens=OFFSETS[:3]), ValueError, "cu_seqlens has"),
        (lambda: run(X, mask=FRONT[:3]), ValueError, r"mask has .*\(3, 5"),
        (lambda: run(X), ValueError, "exactly one of .*starts, mask"),
        (
            lambda: run({"a": X, "b": X[:3]}, LENGTHS),
            ValueError,
            r"\(4,\).*sizes \(3,\)",
        ),
        (
            lambda: bidirectional(first, first, X, LENGTHS),
            ValueError,
            r"forward .*\(4, 5\).*no axis beyond .*\(0, 1\) .*jax\.numpy\.add",
        ),
        (
            lambda: bidirectional(jnp.sin, jnp.sin, X[0], mask=FRONT[0], axis=1),
            ValueError,
            "mask has",
        ),
        (
            lambda: run(X, LENGTHS, merge=sum),
            ValueError,
            r"merge is the builtin sum.*jax\.numpy\.add",
        ),
        (
            lambda: run(X, LENGTHS, merge="sum"),
            TypeError,
            r"merge is 'sum'.*jax\.numpy\.add",
        ),
        (
            lambda: bidirectional(None, sums, X, LENGTHS),
            TypeError,
            "forward is None.*must be a function of x",
        ),
        (
            lambda: bidirectional(sums, sums(X), X, LENGTHS),
            TypeError,
            r"backward is int32\[.*must be a function of x",
        ),
    ):
        with pytest.raises(error, match=f"(?s)^bidirectional: .*{pattern}"):
            call()
    # The other merge takes what the default refuses.
    assert bidirectional(first, first, X, LENGTHS, merge=jnp.add).shape == (4, 5)


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
        bidirectional(**layers, x=X, lengths=LENGTHS)
    message = str(e.value)
    assert message.startswith(f"bidirectional: {side} returned output"), message
    assert "sizes (4, 5) at axes (0, 1)" in message
    assert e.match(where)


def test_results_of_different_structures():
    """Fails if the message does not name the layers, or a custom merge is refused."""
    run = partial(bidirectional, lambda x: (x, x), lambda x: [x], X, LENGTHS)
    with pytest.raises(
        ValueError, match=r"^bidirectional: forward.*\(\*, \*\).*\[\*\]"
    ):
        run()
    forward, backward = run(merge=lambda *both: both)
    assert len(forward) == 2 and len(backward) == 1

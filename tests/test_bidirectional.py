"""bidirectional: reverse, run, reverse back, merge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_revseg import associative_scan_segments, bidirectional
from tests import ragged
from tests.cases import Case, assert_same_bits
from tests.meshes import make_mesh
from tests.ragged import LENGTHS, MASK, N, T, close, combine_by_hand, gradients, same


def sums(x):
    """A layer whose every step depends on all steps before it, in whole numbers."""
    return jnp.cumsum(x, 1)


def reverse(x, axis=1, batch_axes=(0,)):
    return Case("", x.shape, axis=axis, batch_axes=batch_axes).expected(x, LENGTHS)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 99, shape, np.int32)


def fill(x, valid):
    """What the layers get at padding: a valid step of the row, or of another row."""
    first = x[np.arange(len(x)), valid.argmax(1)]
    first[~valid.any(1)] = first[valid.any(1)][0]
    return np.where(valid[..., None], x, first[:, None])


X, FRONT = numbers((N, T, 2)), np.arange(T) < LENGTHS[:, None]
FILLED = fill(X, FRONT)


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


def test_ufuncs_and_merge():
    """Fails if merge does not get the two results, or a layer must be a function."""
    run = partial(bidirectional, jnp.positive, jnp.negative, merge=jnp.add)
    assert_same_bits(run(X, LENGTHS), 0 * X)
    assert_same_bits(jax.jit(run)(X, LENGTHS), 0 * X)


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


@pytest.mark.parametrize("name", ("ids", "ids and padding", "offsets", "starts"))
def test_packed(name):
    """Fails if segments move, or a layer that restarts at the same ids restarts
    elsewhere."""
    packed = ragged.PACKED[name]
    layer = partial(associative_scan_segments, jnp.add, **packed)
    run = partial(bidirectional, layer, layer, merge=lambda *both: both)
    want = [combine_by_hand(jnp.add, X, None, way, **packed) for way in (False, True)]
    for f in (run, jax.jit(run, static_argnames="padding_id")):
        same(f(X, **packed), tuple(want))


def cumulative(w, x):
    """Several leaves in, and out; no square root or logarithm of NaN has a gradient."""
    h = jnp.sqrt(x["a"]) @ w["x"] + jnp.log(x["b"])[..., None]
    h = jnp.sin(jnp.cumsum(h, 1)) @ w["h"]
    return {"h": h, "k": h[..., :1] * x["b"][..., None]}


def valid_steps_alone(weights, x, mask):
    """What `bidirectional` must do, row by row, on the valid steps alone."""
    ys = {"h": jnp.zeros((N, T, 4)), "k": jnp.zeros((N, T, 2))}
    for n, row in enumerate(mask):
        for way, w in enumerate(weights):
            at = np.flatnonzero(row)[:: 1 - 2 * way]
            out = cumulative(w, {k: a[n, at][None] for k, a in x.items()})
            for name, y in out.items():
                features = slice(way * y.shape[-1], (way + 1) * y.shape[-1])
                ys[name] = ys[name].at[n, at, features].set(y[0])
    return ys


EMPTY = np.zeros((N, T), bool)


@pytest.mark.parametrize(
    "mask, encoding, axis",
    (
        (FRONT, "lengths", 1),
        (EMPTY, "lengths", 1),
        (MASK, "mask", 0),
        (EMPTY, "mask", 1),
    ),
    ids=("front", "none", "holes, time-major", "empty"),
)
def test_padding(mask, encoding, axis):
    """Fails if a layer sees padding, in place of a hole say, or NaN there reaches an
    output or a gradient."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, (N, T, 2)), rng.uniform(1, 2, (N, T))
    x = {"a": np.where(mask[..., None], a, np.nan), "b": np.where(mask, b, np.nan)}
    weights = [{k: rng.normal(size=(2, 2)) for k in "hx"} for _ in range(2)]
    operands = jax.tree.map(np.float32, (weights, x))
    swap = partial(jax.tree.map, lambda a: jnp.moveaxis(a, 1, axis))

    def ours(mask, weights, x):
        layers = [lambda x, w=w: swap(cumulative(w, swap(x))) for w in weights]
        of = dict(mask=swap(mask)) if encoding == "mask" else dict(lengths=mask.sum(1))
        ys = swap(bidirectional(*layers, swap(x), axis=axis, **of))
        if encoding == "mask":
            return ys
        return jax.tree.map(lambda y: jnp.where(mask[..., None], y, 0), ys)

    want = jax.jit(partial(gradients, partial(valid_steps_alone, mask=mask)))(*operands)

    def run(mask, *operands):
        return gradients(partial(ours, mask), *operands)

    on_device = jax.tree.map(jnp.asarray, (mask, *operands))
    close(jax.jit(run)(*on_device), want)
    if mask is MASK:
        close(run(mask, *operands), want)  # Eagerly, from the host.


def test_one_sequence():
    """Fails if a scalar length, or a mask, is refused without a batch."""
    layers = (lambda x: x), (lambda x: jnp.cumsum(x, 0))
    run = partial(bidirectional, *layers, X[0], merge=lambda a, b: b)
    mask = MASK[0]
    for out, x in ((run(3)[:3], X[0, :3]), (run(mask=mask)[mask], X[0, mask])):
        assert_same_bits(out, np.cumsum(x[::-1], 0, dtype=np.int32)[::-1])


@pytest.mark.parametrize("shape", ((4, 0, 2), (0, 5, 2), (4, 5, 0)))
def test_nothing(shape):
    """Fails on an axis of size 0."""
    x, mask = np.zeros(shape), np.zeros(shape[:2], bool)
    for of in (dict(mask=mask), dict(lengths=mask.sum(1)), dict(starts=mask)):
        out = bidirectional(sums, sums, x, **jax.tree.map(jnp.asarray, of))
        assert out.shape == (*shape[:2], 2 * shape[2])


def times_position(scale, x, first=0):
    return scale * x * (first + jnp.arange(x.shape[1]))[:, None]


@pytest.mark.parametrize("name", ragged.LONGER)
def test_sharded_segment_axis(name):
    """Fails if rows are reversed within a block, or an encoding is refused."""
    key, given, static = ragged.split(ragged.LONGER[name])
    x, blocks = numbers((N, T + 1, 2)).astype(np.float32), P(None, "b")

    def run(x, given, **more):
        first = 4 * lax.axis_index("b") if more else 0
        layers = [partial(times_position, scale, first=first) for scale in (1, 2)]
        return bidirectional(*layers, x, **{key: given}, **static, **more)

    spec = blocks if key in ("segment_ids", "starts") else P()
    specs = dict(in_specs=(blocks, spec), out_specs=blocks)
    f = jax.shard_map(partial(run, axis_name="b"), mesh=make_mesh(), **specs)
    want, got = run(x, given), jax.jit(f)(x, jnp.asarray(given))
    valid = ragged.valid_steps((N, T + 1), **ragged.LONGER[name])
    np.testing.assert_array_equal(got[valid], want[valid])


def test_no_mask_with_axis_name():
    blocks = P(None, "b")
    f = lambda x, m: bidirectional(sums, sums, x, mask=m, axis_name="b")  # noqa: E731
    f = jax.shard_map(f, mesh=make_mesh(), in_specs=blocks, out_specs=blocks)
    with pytest.raises(ValueError, match="mask and axis_name='b'"):
        f(jnp.ones((4, 6, 2)), jnp.ones((4, 6), bool))


def test_errors():
    """Fails if the message names a function that the user did not call, or no
    argument."""
    first, both = (lambda x: x[..., 0]), {"a": X, "b": X[:3]}
    right = dict(forward=sums, backward=sums, x=X, lengths=LENGTHS)
    for changed, error, pattern in (
        (dict(x=[]), ValueError, r"x is \[\].*at least 1"),
        (dict(x="abc"), TypeError, "x must be an array.*type str"),
        (dict(x=both), ValueError, r"\(4,\).*\(3,\)"),
        (dict(lengths=[1, 2]), ValueError, r"lengths has .*\(2,\).*\(4,\)"),
        (dict(lengths=[8] * 4), ValueError, r"lengths\[0\] is 8.*0 and 7"),
        (dict(lengths=[1.0] * 4), TypeError, "lengths is .*1.0"),
        (dict(lengths=None), ValueError, "exactly one of .*starts, mask"),
        (dict(axis=3), ValueError, "axis is 3.*rank 3"),
        (dict(segment_ids=ragged.IDS[:3]), ValueError, r"segment_ids has .*\(3, 7"),
        (dict(cu_seqlens=ragged.OFFSETS[:3]), ValueError, "cu_seqlens has"),
        (dict(mask=FRONT[:3]), ValueError, r"mask has .*\(3, 7"),
        (dict(x=X[0], mask=FRONT[0], axis=1), ValueError, "mask has"),
        (
            dict(forward=first, backward=first),
            ValueError,
            r"forward .*\(4, 7\).*\(0, 1\).*jax\.numpy\.add",
        ),
        (dict(forward=first, lengths=FRONT.astype(int)), ValueError, "forward .*mask="),
        (dict(merge=jnp.concatenate), ValueError, r"merge is concat.*jax\.numpy\.add"),
        (dict(merge=sum), ValueError, r"merge .*sum.*jax\.numpy\.add"),
        (dict(merge="sum"), TypeError, r"merge is 'sum'.*jax\.numpy\.add"),
        (dict(forward=None), TypeError, "forward is None"),
        (dict(backward=sums(X)), TypeError, r"backward is int32\["),
    ):
        if {"segment_ids", "cu_seqlens", "mask"} & {*changed}:
            changed["lengths"] = None
        with pytest.raises(error, match=f"(?s)^bidirectional: .*{pattern}"):
            bidirectional(**right | changed)
    # The other merge takes what the default refuses.
    assert bidirectional(first, first, X, LENGTHS, merge=jnp.add).shape == (N, T)


@pytest.mark.parametrize("side", ("forward", "backward"))
def test_final_carries_are_refused(side):
    """Fails if a carry comes back with its features reversed, in silence."""
    for carry, where in (
        (lambda x: (x[:, -1], x), r"\[0\] of shape \(4, 2\)"),
        (lambda x: {"ys": x, "h": x[:3]}, r"\['h'\] of shape \(3, 7, 2\)"),
        (lambda x: x[0, 0], r" of shape \(2,\)"),
        (lambda x: jnp.swapaxes(x, 0, 1), r" of shape \(7, 4, 2\)"),
    ):
        layers = {"forward": sums, "backward": sums} | {side: carry}
        rule = rf"^bidirectional: {side} .*{where}.*\(4, 7\).*\(0, 1\).*_scan"
        with pytest.raises(ValueError, match=f"(?s){rule}"):
            bidirectional(**layers, x=X, lengths=LENGTHS)


def test_results_of_different_structures():
    """Fails if the message does not name the layers, or a custom merge is refused."""
    run = partial(bidirectional, lambda x: (x, x), lambda x: [x], X, LENGTHS)
    rule = r"^bidirectional: forward.*\(\*, \*\).*\[\*\]"
    with pytest.raises(ValueError, match=rule):
        run()
    forward, backward = run(merge=lambda *both: both)
    assert len(forward) == 2 and len(backward) == 1

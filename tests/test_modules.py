"""bidirectional inside the modules of Equinox, Flax and Haiku.

A module that loses sight of a layer trains only what is left, and says nothing: so
every parameter's gradient is compared with that of the two layers written by hand.
"""

import io
import pickle
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import bidirectional

pytestmark = pytest.mark.peers

N, T, D, H = 4, 6, 3, 5
LENGTHS = np.array([T, 0, 1, 4])
VALID = (np.arange(T) < LENGTHS[:, None])[..., None]
X = np.random.default_rng(0).normal(size=(N, T, D)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(N, T, 2 * H)).astype(np.float32)
GRU = {"nnx": 3 * H * (D + H + 1), "linen": 3 * H * (D + H) + 4 * H}
GRU |= {"equinox": 3 * H * (D + H + 1) + H, "haiku": 3 * H * (D + H + 1)}


def by_hand(forward, backward, x):
    """Two layers, and the reversal as the snippet that everyone copies."""
    t, n = np.arange(T), LENGTHS[:, None]
    index = np.where(t < n, n - 1 - t, t)[..., None]
    back = backward(jnp.take_along_axis(x, index, 1))
    return jnp.concatenate([forward(x), jnp.take_along_axis(back, index, 1)], -1)


def loss(y):
    return jnp.sum(jnp.where(VALID, y, 0) * WEIGHTS)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def check_gradients(got, want, parameters):
    """Every parameter is there, has a gradient, and it is the right one."""
    assert size(got) == parameters
    assert all(np.any(leaf) for leaf in jax.tree.leaves(got))
    close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(jax.tree.leaves(got), jax.tree.leaves(want))


# ---- Equinox


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox", reason="Equinox is not installed")


def equinox_layers(eqx, seed=0):
    """Two layers of one row each."""

    class Layer(eqx.Module):
        cell: eqx.nn.GRUCell

        def __call__(self, xs):
            def step(h, x):
                h = self.cell(x, h)
                return h, h

            return jax.lax.scan(step, jnp.zeros(H), xs)[1]

    keys = jax.random.split(jax.random.key(seed))
    return tuple(Layer(eqx.nn.GRUCell(D, H, key=key)) for key in keys)


def equinox_model(eqx, layers, batched):
    class Model(eqx.Module):
        both: object

        def __call__(self, x):
            if batched:
                return self.both(x, LENGTHS)
            return jax.vmap(self.both)(x, jnp.asarray(LENGTHS))

    if batched:
        layers = [eqx.filter_vmap(layer) for layer in layers]
    return Model(bidirectional(*layers))


@pytest.mark.parametrize("batched", (False, True))
def test_equinox(eqx, batched):
    """As a field of a module, of layers of one row and of mapped layers."""
    layers = equinox_layers(eqx)
    model = equinox_model(eqx, layers, batched)
    got = eqx.filter_jit(eqx.filter_grad(lambda model: loss(model(X))))(model)
    want = eqx.filter_grad(lambda layers: loss(by_hand(*map(jax.vmap, layers), X)))
    check_gradients(got, want(layers), 2 * GRU["equinox"])

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    other = equinox_model(eqx, equinox_layers(eqx, seed=1), batched)
    assert not np.allclose(other(X), model(X))
    restored = eqx.tree_deserialise_leaves(file, other)
    np.testing.assert_array_equal(restored(X), model(X))


def test_equinox_sequential(eqx):
    """`eqx.nn.Sequential` passes one value, which must carry the length as well."""

    class Ragged(eqx.Module):
        layer: object

        def __call__(self, x_and_length, *, key=None):
            x, length = x_and_length
            return self.layer(x, length), length

    layers = equinox_layers(eqx)
    model = eqx.nn.Sequential([Ragged(bidirectional(*layers))])

    def run(model):
        return jax.vmap(model)((X, jnp.asarray(LENGTHS)))[0]

    got = eqx.filter_grad(lambda model: loss(run(model)))(model)
    want = eqx.filter_grad(lambda layers: loss(by_hand(*map(jax.vmap, layers), X)))
    check_gradients(got, want(layers), 2 * GRU["equinox"])


# ---- Flax NNX


@pytest.fixture
def nnx():
    pytest.importorskip("flax", reason="Flax is not installed")
    return pytest.importorskip("flax.nnx")


def nnx_model(nnx, seed=0, wrap=lambda layer: layer):
    class Model(nnx.Module):
        def __init__(self, rngs):
            cells = [nnx.GRUCell(D, H, rngs=rngs) for _ in range(2)]
            self.both = wrap(bidirectional(*(nnx.RNN(c, rngs=rngs) for c in cells)))

        def __call__(self, x):
            return self.both(x, LENGTHS)

    return Model(nnx.Rngs(seed))


def values(nnx, model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("wrapped", (False, True))
def test_nnx(nnx, wrapped):
    """As an attribute of a module, which needs no `nnx.data`, and may have one."""
    model = nnx_model(nnx, wrap=nnx.data if wrapped else lambda layer: layer)
    got = nnx.jit(nnx.grad(lambda model: loss(model(X))))(model)

    def layers(model):
        return loss(by_hand(model.both.forward, model.both.backward, X))

    want = nnx.grad(layers)(model)
    check_gradients(nnx.to_pure_dict(got), nnx.to_pure_dict(want), 2 * GRU["nnx"])
    np.testing.assert_allclose(
        nnx.jit(lambda model: model(X))(model)[VALID[..., 0]],
        by_hand(model.both.forward, model.both.backward, X)[VALID[..., 0]],
        atol=1e-6,
    )


def test_nnx_is_saved_restored_and_trained(nnx):
    """Split and merged, into another model of the same shape, and by an optimiser."""
    optax = pytest.importorskip("optax", reason="Optax is not installed")
    model, other = nnx_model(nnx), nnx_model(nnx, seed=1)
    assert not np.allclose(other(X), model(X))
    np.testing.assert_array_equal(nnx.merge(*nnx.split(model))(X), model(X))
    nnx.update(other, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(other(X), model(X))

    optimiser = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimiser.update(model, nnx.grad(lambda model: loss(model(X)))(model))
    pairs = zip(values(nnx, model), values(nnx, other), strict=True)
    assert all(np.any(new != old) for new, old in pairs)


def test_nnx_refuses_carries(nnx):
    """The carries of `nnx.RNN(return_carry=True)` would be reversed like outputs."""
    cells = [nnx.GRUCell(D, H, rngs=nnx.Rngs(0)) for _ in range(2)]
    layers = [nnx.RNN(cell, return_carry=True, rngs=nnx.Rngs(0)) for cell in cells]
    message = r"forward.*output\[0\].*\(4, 5\).*\(4, 6\).*bidirectional_scan"
    with pytest.raises(ValueError, match=message):
        bidirectional(*layers)(X, LENGTHS)


# ---- Flax Linen and Haiku: layers exist while the model runs, and so does the pair.


@pytest.mark.parametrize("setup", (False, True))
def test_linen(setup):
    """In a compact method, and in a module whose layers are made by `setup`."""
    pytest.importorskip("flax", reason="Flax is not installed")
    from flax import linen as nn

    def layers():
        return nn.RNN(nn.GRUCell(H)), nn.RNN(nn.GRUCell(H))

    class Compact(nn.Module):
        run: object

        @nn.compact
        def __call__(self, x):
            return self.run(*layers(), x)

    class Setup(nn.Module):
        run: object

        def setup(self):
            self.forward, self.backward = layers()

        def __call__(self, x):
            return self.run(self.forward, self.backward, x)

    def both(forward, backward, x):
        return bidirectional(forward, backward)(x, LENGTHS)

    ours, theirs = ((Setup if setup else Compact)(run) for run in (both, by_hand))
    params = ours.init(jax.random.key(0), X)
    got = jax.jit(jax.grad(lambda params: loss(ours.apply(params, X))))(params)
    want = jax.grad(lambda params: loss(theirs.apply(params, X)))(params)
    check_gradients(got, want, 2 * GRU["linen"])


def test_haiku():
    """In a transformed function."""
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def model(run):
        def layer(core, x):
            start = core.initial_state(len(x))
            return hk.dynamic_unroll(core, x, start, time_major=False)[0]

        def apply(x):
            return run(*(partial(layer, hk.GRU(H)) for _ in range(2)), x)

        return hk.without_apply_rng(hk.transform(apply))

    ours = model(lambda *args: bidirectional(*args[:2])(args[2], LENGTHS))
    theirs = model(by_hand)
    params = ours.init(jax.random.key(0), X)
    got = jax.jit(jax.grad(lambda params: loss(ours.apply(params, X))))(params)
    want = jax.grad(lambda params: loss(theirs.apply(params, X)))(params)
    check_gradients(got, want, 2 * GRU["haiku"])


# ---- Functions


def layer(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["state"])
        return h, h

    return jnp.swapaxes(
        jax.lax.scan(step, jnp.zeros((len(x), H)), jnp.swapaxes(x, 0, 1))[1], 0, 1
    )


def test_functions():
    """A function with its parameters is a pytree: it trains, and can be pickled."""
    rng = np.random.default_rng(2)
    pair = [
        {
            "in": jnp.asarray(rng.normal(size=(D, H)), jnp.float32),
            "state": jnp.asarray(rng.normal(size=(H, H)) / H, jnp.float32),
        }
        for _ in range(2)
    ]
    both = bidirectional(*(jax.tree_util.Partial(layer, params) for params in pair))
    got = jax.jit(jax.grad(lambda both: loss(both(X, LENGTHS))))(both)

    def hand(pair):
        return loss(by_hand(*(partial(layer, params) for params in pair), X))

    check_gradients(got, jax.grad(hand)(pair), 2 * H * (D + H))
    restored = pickle.loads(pickle.dumps(both))
    np.testing.assert_array_equal(restored(X, LENGTHS), both(X, LENGTHS))

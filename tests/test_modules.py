"""bidirectional around the layers of Equinox, Flax and Haiku.

A module that loses sight of a layer trains only what is left, and says nothing: so
every parameter's gradient is compared with that of the two layers written by hand.
"""

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


def ours(forward, backward, x):
    return bidirectional(forward, backward, x, LENGTHS)


def by_hand(forward, backward, x):
    """Two layers, and the reversal as the snippet that everyone copies."""
    t, n = np.arange(T), LENGTHS[:, None]
    index = np.where(t < n, n - 1 - t, t)[..., None]
    back = backward(jnp.take_along_axis(x, index, 1))
    return jnp.concatenate([forward(x), jnp.take_along_axis(back, index, 1)], -1)


def loss(y):
    return jnp.sum(jnp.where(VALID, y, 0) * WEIGHTS)


def check_gradients(got, want, parameters):
    """Every parameter is there, has a gradient, and it is the right one."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert sum(leaf.size for leaf in got) == parameters
    assert all(np.any(leaf) for leaf in got)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", (False, True))
def test_equinox(batched):
    """Layers of one row, one by one and mapped."""
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Layer(eqx.Module):
        cell: eqx.nn.GRUCell

        def __call__(self, xs):
            def step(h, x):
                h = self.cell(x, h)
                return h, h

            return jax.lax.scan(step, jnp.zeros(H), xs)[1]

    def run(layers):
        if batched:
            return ours(*map(eqx.filter_vmap, layers), X)
        return jax.vmap(partial(bidirectional, *layers))(X, jnp.asarray(LENGTHS))

    keys = jax.random.split(jax.random.key(0))
    layers = [Layer(eqx.nn.GRUCell(D, H, key=key)) for key in keys]
    got = eqx.filter_jit(eqx.filter_grad(lambda layers: loss(run(layers))))(layers)
    want = eqx.filter_grad(lambda layers: loss(by_hand(*map(jax.vmap, layers), X)))
    check_gradients(got, want(layers), 2 * GRU["equinox"])


def test_nnx():
    """Layers that are attributes of a module."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs):
            cells = [nnx.GRUCell(D, H, rngs=rngs) for _ in range(2)]
            self.forward, self.backward = (nnx.RNN(c, rngs=rngs) for c in cells)

        def __call__(self, x, run):
            return run(self.forward, self.backward, x)

    model = Model(nnx.Rngs(0))
    got = nnx.jit(nnx.grad(lambda model: loss(model(X, ours))))(model)
    want = nnx.grad(lambda model: loss(model(X, by_hand)))(model)
    check_gradients(nnx.to_pure_dict(got), nnx.to_pure_dict(want), 2 * GRU["nnx"])
    got = nnx.jit(lambda model: model(X, ours))(model)
    valid = VALID[..., 0]
    np.testing.assert_allclose(got[valid], model(X, by_hand)[valid], atol=1e-6)


# In Flax Linen and Haiku layers exist while the model runs.


def check_models(model, name):
    params = model(ours).init(jax.random.key(0), X)

    def grad(run):
        return jax.grad(lambda params: loss(model(run).apply(params, X)))

    got = jax.jit(grad(ours))(params)
    check_gradients(got, grad(by_hand)(params), 2 * GRU[name])


@pytest.mark.parametrize("setup", (False, True))
def test_linen(setup):
    """In a compact method, and in a module whose layers are made by `setup`."""
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

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

    check_models(Setup if setup else Compact, "linen")


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

    check_models(model, "haiku")

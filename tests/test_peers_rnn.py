"""PyTorch's bidirectional LSTM and GRU with the same weights, in float64.

PyTorch gets packed sequences, and ours NaN in the padding. The outputs, the final
states and the gradients of x, of all weights and of the initial states must agree. For
other encodings and scans test_scan.py has an oracle; Keras, with holes in its masks, is
in docs/rnn.md. `HYPOTHESIS_PROFILE=fuzz` (`make fuzz-peers`) runs 200 random models of
each kind.
"""

import os
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import bidirectional_scan
from tests.cases import enable_x64

pytestmark = pytest.mark.peers

# Rows, steps, features, units. Few sizes, so that models share compiled programs.
SIZES = ((5, 9, 3, 4), (4, 7, 2, 1), (2, 4, 1, 3))


class Model(NamedTuple):
    """Stacked bidirectional layers."""

    kind: str
    encoding: str
    axis: int
    layers: int
    sizes: tuple[int, int, int, int]
    seed: int


def valid_steps(model: Model) -> np.ndarray:
    n, t, *_ = model.sizes
    lengths = np.random.default_rng(model.seed).integers(1, t + 1, (n, 1))
    return np.arange(t) < lengths  # PyTorch packs no empty rows.


def operands(model: Model):
    """Weights and initial states of each layer and direction, and x."""
    rng = np.random.default_rng(model.seed)
    n, t, d, h = model.sizes
    states, gates = dict(LSTM=(2, 4 * h), GRU=(1, 3 * h))[model.kind]

    def weights(width):
        shapes = dict(x=(width, gates), h=(h, gates), bx=(gates,), bh=(gates,))
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}

    widths = [d] + [2 * h] * (model.layers - 1)
    params = [[weights(width) for _ in range(2)] for width in widths]
    inits = [
        [tuple(rng.normal(size=(n, h)) for _ in range(states)) for _ in range(2)]
        for _ in widths
    ]
    return params, inits, rng.normal(size=(n, t, d))


def loss(outputs, tensor, add):
    """The sum of all results, each element with a weight of its own."""
    total = 0
    for i, y in enumerate(jax.tree.leaves(outputs)):
        weights = np.cos(i + np.arange(np.prod(y.shape))).reshape(y.shape)
        total = total + add(y * tensor(weights))
    return total


# ---- ours


def gru(params, carry, x):
    (h,) = carry
    xr, xz, xn = jnp.split(x @ params["x"] + params["bx"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"] + params["bh"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return (h,), h


def lstm(params, carry, x):
    h, c = carry
    gates = x @ params["x"] + params["bx"] + h @ params["h"] + params["bh"]
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def ours(model: Model, valid, params, inits, x):
    step = dict(GRU=gru, LSTM=lstm)[model.kind]
    encoding = {
        "lengths": dict(lengths=valid.sum(1)),
        "mask": dict(mask=valid),
        "ids": dict(segment_ids=valid.astype(int), padding_id=0),
    }[model.encoding]
    x, ends = jnp.moveaxis(x, 1, model.axis), []
    for pair, init in zip(params, inits, strict=True):
        end, ys = bidirectional_scan(step, pair, init, x, axis=model.axis, **encoding)
        x = jnp.concatenate(ys, -1)
        ends.append(end)
    return jnp.moveaxis(x, model.axis, 1), ends


@cache
def program(model: Model):
    """All results and gradients, compiled once for models that differ in values."""

    def run(params, inits, x, valid):
        got = ours(model, valid, params, inits, x)
        return loss(got, jnp.asarray, jnp.sum), got

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


# ---- theirs


def theirs(model: Model, valid, params, inits, x):
    """Outputs, final states, and all gradients."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    n, t, d, h = model.sizes
    layers = getattr(torch.nn, model.kind)(
        d, h, model.layers, batch_first=True, bidirectional=True, dtype=torch.float64
    )
    keys = dict(weight_ih="x", weight_hh="h", bias_ih="bx", bias_hh="bh")
    suffixes = ("", "_reverse")

    def tensors(layer, suffix):
        named = dict(layers.named_parameters())
        return {k: named[f"{name}_l{layer}{suffix}"] for name, k in keys.items()}

    named = [[tensors(i, suffix) for suffix in suffixes] for i in range(model.layers)]
    for tensor, value in zip(*map(jax.tree.leaves, (named, params)), strict=True):
        tensor.data = torch.tensor(value.T)
    x, inits = jax.tree.map(partial(torch.tensor, requires_grad=True), (x, inits))
    flat = [states for pair in inits for states in pair]
    starts = [torch.stack(s).expand(-1, n, -1) for s in zip(*flat, strict=True)]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(valid.sum(1)), batch_first=True, enforce_sorted=False
    )
    ys, ends = layers(packed, tuple(starts) if len(starts) > 1 else starts[0])
    ys = torch.nn.utils.rnn.pad_packed_sequence(ys, True, total_length=t)[0]
    ends = ends if len(starts) > 1 else (ends,)
    ends = [
        [tuple(end[2 * i + k] for end in ends) for k in range(2)]
        for i in range(model.layers)
    ]
    loss((ys, ends), torch.tensor, torch.sum).backward()
    values = jax.tree.map(lambda a: a.detach().numpy(), (ys, ends))
    weights = jax.tree.map(lambda a: a.grad.numpy().T, named)
    return values, (weights, *jax.tree.map(lambda a: a.grad.numpy(), (inits, x)))


RANDOM = 200 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 1


@pytest.mark.parametrize("encoding", ("lengths", "mask", "ids"))
@pytest.mark.parametrize("kind", ("LSTM", "GRU"))
@pytest.mark.parametrize("seed", range(RANDOM))
def test_like_torch(seed, kind, encoding):
    """Weights taken from PyTorch give other values, or train otherwise, here."""
    rng = np.random.default_rng(seed)
    axis, layers, sizes = rng.integers(2), rng.integers(1, 3), rng.integers(3)
    model = Model(kind, encoding, int(axis), int(layers), SIZES[sizes], seed)
    valid = valid_steps(model)
    params, inits, x = operands(model)
    want = theirs(model, valid, params, inits, x)
    x = np.where(valid[..., None], x, np.nan)
    with enable_x64():
        (_, got), grads = program(model._replace(seed=0))(params, inits, x, valid)
    assert got[0].dtype == np.float64
    pairs = zip(*map(jax.tree.leaves, ((got, grads), want)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=str(model))

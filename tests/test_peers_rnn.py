"""PyTorch's and Keras's bidirectional LSTM and GRU with the same weights, in float64.

PyTorch gets packed sequences and Keras gets a mask. Ours get NaN in the padding, except
for `bidirectional`, whose layers do not skip padding. The outputs, the final states and
the gradients of x, of all weights and of the initial states must agree.
`HYPOTHESIS_PROFILE=fuzz` (`make fuzz-peers`) runs 200 random models of each framework
in every way.
"""

import os
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_revseg import bidirectional, bidirectional_scan, scan_segments
from tests.cases import enable_x64

pytestmark = pytest.mark.peers

WAYS = ("bidirectional_scan", "scan_segments", "bidirectional", "packed")
# Rows, steps, features, units. Few sizes, so that models share compiled programs.
SIZES = ((5, 9, 3, 4), (4, 7, 2, 1), (2, 4, 1, 3))


class Model(NamedTuple):
    """Stacked bidirectional layers, and the way in which ours run them."""

    kind: str
    way: str
    encoding: str = "lengths"
    axis: int = 1
    layers: int = 2
    sizes: tuple[int, int, int, int] = SIZES[0]
    holes: bool = False
    seed: int = 1


def random_model(seed: int, way: str, masks: bool) -> Model:
    rng = np.random.default_rng(seed)
    holes = masks and way != "bidirectional" and rng.random() < 0.5
    encodings = ["mask"] if holes else ["lengths", "mask", "ids"]
    if way in ("bidirectional", "packed"):  # They have one.
        encodings = ["lengths"]
    return Model(
        str(rng.choice(["LSTM", "GRU"])),
        way,
        str(rng.choice(encodings)),
        int(rng.integers(2)),
        int(rng.integers(1, 3)),
        SIZES[rng.integers(3)],
        holes,
        seed,
    )


def valid_steps(model: Model, shortest: int) -> np.ndarray:
    rng = np.random.default_rng(model.seed)
    n, t, *_ = model.sizes
    if model.holes:
        valid = rng.random((n, t)) < rng.random((n, 1))
    else:
        valid = np.arange(t) < rng.integers(shortest, t + 1, (n, 1))
    valid[0, 0] = True  # At least one step.
    return valid


def operands(model: Model):
    """Weights and initial states of each layer and direction, and x."""
    rng = np.random.default_rng(model.seed)
    n, t, d, h = model.sizes
    states, gates = dict(LSTM=(2, 4 * h), GRU=(1, 3 * h))[model.kind]
    rows = 1 if model.way == "packed" else n  # All segments of a row share init.

    def weights(width):
        shapes = dict(x=(width, gates), h=(h, gates), bx=(gates,), bh=(gates,))
        return {name: rng.normal(size=shape) for name, shape in shapes.items()}

    widths = [d] + [2 * h] * (model.layers - 1)
    params = [[weights(width) for _ in range(2)] for width in widths]
    inits = [
        [tuple(rng.normal(size=(rows, h)) for _ in range(states)) for _ in range(2)]
        for _ in widths
    ]
    return params, inits, rng.normal(size=(n, t, d))


def final_states(model: Model, valid, ends):
    """Those that this way returns: packed rows end at their last segment."""
    if model.way == "bidirectional":
        return []
    if model.way != "packed":
        return ends
    some = np.flatnonzero(valid.any(1))
    rows = (slice(some[-1], some[-1] + 1), slice(some[0], some[0] + 1))
    return [
        [tuple(s[row] for s in states) for row, states in zip(rows, pair, strict=True)]
        for pair in ends
    ]


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


def both_directions(model: Model, params, init, x, **encoding):
    """One layer: the final states, and the outputs of both directions."""
    step = dict(GRU=gru, LSTM=lstm)[model.kind]
    if model.way == "bidirectional":

        def layer(params, init, x):
            time_major = jnp.moveaxis(x, model.axis, 0)
            _, ys = lax.scan(partial(step, params), init, time_major)
            return jnp.moveaxis(ys, 0, model.axis)

        layers = [partial(layer, *of) for of in zip(params, init, strict=True)]
        return (), [bidirectional(*layers)(x, **encoding)]
    if model.way == "scan_segments":
        forward, backward = [
            scan_segments(partial(step, p), start, x, reverse=reverse, **encoding)
            for p, start, reverse in zip(params, init, (False, True), strict=True)
        ]
        return list(zip(forward, backward, strict=True))
    return bidirectional_scan(step, params, init, x, **encoding)


def ours(model: Model, valid, params, inits, x):
    if model.way == "packed":  # The valid steps of all rows in one, then the padding.
        order = jnp.argsort(~valid.ravel(), stable=True)
        x = x.reshape(1, -1, x.shape[-1])[:, order]
        ends = valid.sum(1).cumsum()[None]
        encoding = dict(cu_seqlens=jnp.concatenate([0 * ends[:, :1], ends], 1))
    else:
        encoding = {
            "lengths": dict(lengths=valid.sum(1)),
            "mask": dict(mask=valid),
            "ids": dict(segment_ids=valid.astype(int), padding_id=0),
        }[model.encoding]
    x, ends = jnp.moveaxis(x, 1, model.axis), []
    for pair, init in zip(params, inits, strict=True):
        end, ys = both_directions(model, pair, init, x, axis=model.axis, **encoding)
        x = jnp.concatenate(ys, -1)
        ends.append(end)
    ys = jnp.moveaxis(x, model.axis, 1)
    if model.way == "packed":
        ys = ys[:, jnp.argsort(order)].reshape(*valid.shape, -1)
    if model.way == "bidirectional":
        return jnp.where(valid[..., None], ys, 0), []
    return ys, ends


@cache
def program(model: Model):
    """All results and gradients, compiled once for models that differ in values."""

    def run(params, inits, x, valid):
        got = ours(model, valid, params, inits, x)
        return loss(got, jnp.asarray, jnp.sum), got

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


def compare(model: Model, valid, theirs):
    """`theirs` returns outputs, final states, and all gradients."""
    params, inits, x = operands(model)
    want, want_grads = theirs(model, valid, params, inits, x)
    if model.way != "bidirectional":
        x = np.where(valid[..., None], x, np.nan)
    with enable_x64():
        run = program(model._replace(seed=0, holes=False))
        (_, got), grads = run(params, inits, x, valid)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    assert got[0].dtype == np.float64
    for a, b in ((got, want), (grads, want_grads)):
        leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
        assert len(leaves) == len(others)
        for leaf, other in zip(leaves, others, strict=True):
            close(leaf, other, err_msg=str(model))


# ---- theirs


def torch_layers(model: Model, valid, params, inits, x):
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
    ends = final_states(model, valid, ends)
    loss((ys, ends), torch.tensor, torch.sum).backward()
    values = jax.tree.map(lambda a: a.detach().numpy(), (ys, ends))
    weights = jax.tree.map(lambda a: a.grad.numpy().T, named)
    return values, (weights, *jax.tree.map(lambda a: a.grad.numpy(), (inits, x)))


def keras_layers(model: Model, valid, params, inits, x):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    n, _, _, h = model.sizes

    def gates(a):
        """Keras has the update gate before the reset gate."""
        blocks = np.split(np.asarray(a), np.arange(h, np.shape(a)[-1], h), -1)
        if model.kind == "GRU":
            blocks[:2] = blocks[1::-1]
        return np.concatenate(blocks, -1)

    def to_keras(p):
        biases = (gates(p["bx"]), gates(p["bh"]))
        bias = np.stack(biases) if model.kind == "GRU" else sum(biases)
        return [gates(p["x"]), gates(p["h"]), bias]

    def from_keras(kernel, recurrent, bias):
        bx, bh = gates(bias) if model.kind == "GRU" else (bias, bias)
        return dict(x=gates(kernel), h=gates(recurrent), bx=np.asarray(bx), bh=bh)

    x, inits = jax.tree.map(tf.constant, (x, inits))
    ys, ends, weights = x, [], []
    with tf.GradientTape() as tape:
        tape.watch(jax.tree.leaves((x, inits)))
        for pair, init in zip(params, inits, strict=True):
            layer = keras.layers.Bidirectional(
                getattr(keras.layers, model.kind)(
                    h, return_sequences=True, return_state=True, dtype="float64"
                ),
                dtype="float64",
            )
            layer.build(ys.shape)
            layer.set_weights([w for p in pair for w in to_keras(p)])
            weights.append(layer.trainable_weights)
            start = [s + tf.zeros((n, 1), s.dtype) for s in jax.tree.leaves(init)]
            ys, *states = layer(ys, initial_state=start, mask=tf.constant(valid))
            half = len(states) // 2
            ends.append([tuple(states[:half]), tuple(states[half:])])
        ends = final_states(model, valid, ends)
        total = loss((ys, ends), tf.constant, tf.reduce_sum)
    variables = [[w.value for w in layer] for layer in weights]
    grads = tape.gradient(total, (variables, inits, x))
    values, grads = jax.tree.map(np.asarray, ((ys, ends), grads))
    pairs = [[from_keras(*g[:3]), from_keras(*g[3:])] for g in grads[0]]
    return values, (pairs, *grads[1:])


# ---- the tests

each_kind = pytest.mark.parametrize("kind", ("LSTM", "GRU"))
if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz":
    RANDOM = tuple(product(range(200), WAYS))
else:
    RANDOM = tuple((seed, WAYS[seed % 4]) for seed in range(5))
each_random = pytest.mark.parametrize("seed, way", RANDOM)


@each_kind
@pytest.mark.parametrize("way", ("bidirectional_scan", "bidirectional"))
def test_like_torch(kind, way):
    """Weights taken from PyTorch give other values, or train otherwise, here."""
    model = Model(kind, way)
    compare(model, valid_steps(model, 1), torch_layers)  # It packs no empty rows.


@each_kind
@pytest.mark.parametrize("way", ("bidirectional_scan", "bidirectional"))
def test_like_keras(kind, way):
    """As for PyTorch; a mask may have holes, which hold the state."""
    holes = way == "bidirectional_scan"
    model = Model(kind, way, "mask" if holes else "lengths", layers=1, holes=holes)
    compare(model, valid_steps(model, 0), keras_layers)


@each_random
def test_random_torch(seed, way):
    """Wrong for some sizes, lengths, encoding or axis."""
    model = random_model(seed, way, masks=False)
    compare(model, valid_steps(model, 1), torch_layers)


@each_random
def test_random_keras(seed, way):
    """Wrong for some sizes, mask, encoding or axis; rows may be empty."""
    model = random_model(seed, way, masks=True)
    compare(model, valid_steps(model, 0), keras_layers)

"""Flax's own RNN and Bidirectional with `flip_sequences` replaced by ours.

They must do what a loop does that calls the cell for the valid steps alone, one row at
a time: in outputs, final carries, and gradients of x and of all parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import reverse_sequence
from tests.cases import KINDS, assert_same_bits

pytest.importorskip("flax", reason="Flax is not installed")
from flax import linen, nnx  # noqa: E402
from flax.nnx.nn.recurrent import flip_sequences  # noqa: E402

pytestmark = pytest.mark.peers

N, T, D, H = 4, 6, 3, 2
LENGTHS = np.array([T, 1, 4, 2])  # Flax takes the final carry of an empty row from -1.


def of_nnx(time_major):
    """The layer, its parameters, those of the two cells among them, and the cell."""
    cells = [nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    layer = nnx.Bidirectional(
        *map(nnx.RNN, cells), time_major=time_major, return_carry=True
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    cell_graph, _, cell_rest = nnx.split(cells[0], nnx.Param, ...)

    def run(params, x):
        mutable = jax.tree.map(jnp.copy, rest)  # It counts the random carries.
        return nnx.merge(graph, params, mutable)(x, seq_lengths=jnp.asarray(LENGTHS))

    def of_cells(params):
        return params["forward_rnn"]["cell"], params["backward_rnn"]["cell"]

    def step(params, carry, x):
        return nnx.merge(cell_graph, params, cell_rest)(carry, x)

    return run, params, of_cells, step


def of_linen(time_major):
    """The same."""
    cells = [linen.OptimizedLSTMCell(H) for _ in range(2)]
    layer = linen.Bidirectional(
        *map(linen.RNN, cells), time_major=time_major, return_carry=True
    )
    shape = (T, N, D) if time_major else (N, T, D)
    params = layer.init(jax.random.key(0), jnp.zeros(shape))

    def run(params, x):
        return layer.apply(params, x, seq_lengths=jnp.asarray(LENGTHS))

    def of_cells(params):
        layers = [params["params"][f"{name}_rnn"] for name in ("forward", "backward")]
        return [{"params": layer["cell"]} for layer in layers]

    return run, params, of_cells, cells[0].apply


@pytest.mark.parametrize("time_major", (False, True))
@pytest.mark.parametrize("flax", (of_nnx, of_linen))
def test_bidirectional(flax, time_major, monkeypatch):
    """Ours in place of `flip_sequences` reverses other steps, or along another axis."""
    run, params, of_cells, step = flax(time_major)
    axis, calls = 1 - time_major, []

    def replacement(x, lengths, num_batch_dims, time_major):
        calls.append((num_batch_dims, time_major))
        return reverse_sequence(x, lengths, axis=axis)

    monkeypatch.setattr("flax.nnx.nn.recurrent.flip_sequences", replacement)
    monkeypatch.setattr("flax.linen.recurrent.flip_sequences", replacement)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, T, D)).astype(np.float32)
    weights = rng.normal(size=(N, T, 2 * H)).astype(np.float32)
    weights *= (np.arange(T) < LENGTHS[:, None])[..., None]
    step = jax.jit(step)

    def theirs(params, x):
        carries, ys = run(params, jnp.moveaxis(x, 1, axis))
        return carries, jnp.moveaxis(ys, axis, 1)

    def loop(params, x):
        carries, outputs = [], []
        for cell, order in zip(of_cells(params), (1, -1), strict=True):
            ys, ends = [[jnp.zeros(H)] * T for _ in range(N)], []
            for n, length in enumerate(LENGTHS):
                carry = (jnp.zeros((1, H)), jnp.zeros((1, H)))
                for t in range(length)[::order]:
                    carry, y = step(cell, carry, x[n : n + 1, t])
                    ys[n][t] = y[0]
                ends.append(carry)
            carries.append(jax.tree.map(lambda *rows: jnp.concatenate(rows), *ends))
            outputs.append(jnp.stack([jnp.stack(row) for row in ys]))
        return tuple(carries), jnp.concatenate(outputs, -1)

    def loss(f):
        def total(params, x):
            carries, ys = f(params, x)
            ys = jnp.where(weights != 0, ys, 0)
            ends = jax.tree.leaves(carries)
            total = (ys * weights).sum() + sum(
                (i + 1) * e.sum() for i, e in enumerate(ends)
            )
            return total, (carries, ys)

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    (_, got), grads = jax.jit(loss(theirs))(params, x)
    (_, want), want_grads = loss(loop)(params, x)
    assert calls == 2 * [(1, time_major)]
    for pair in zip(
        *map(jax.tree.leaves, ((got, grads), (want, want_grads))), strict=True
    ):
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-5)


def test_flip_sequences():
    """On valid steps, flip_sequences and ours disagree; beyond, they do by design."""
    for case in (KINDS[0], KINDS[3]):
        x, lengths = case.x(), case.segments()
        theirs = np.asarray(flip_sequences(jnp.asarray(x), lengths, 1, False))
        valid = (np.arange(case.size) < lengths[:, None])[..., None]
        got = np.asarray(case.call(x, lengths))
        assert_same_bits(np.where(valid, got, 0), np.where(valid, theirs, 0))
        assert_same_bits(np.where(valid, x, got), x)  # Ours keeps the padding.

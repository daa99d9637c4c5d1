"""PyTorch's packed bidirectional GRU and LSTM with the same weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import bidirectional_scan

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = pytest.mark.peers

N, T, D, H = 5, 9, 3, 4
LENGTHS = np.array([T, 1, 4, 7, 2])  # PyTorch packs no empty rows.


def gates(params, h, x):
    own = x @ params["weight_ih"].T + params["bias_ih"]
    return own, h @ params["weight_hh"].T + params["bias_hh"]


def gru(params, h, x):
    (xr, xz, xn), (hr, hz, hn) = (jnp.split(g, 3, -1) for g in gates(params, h, x))
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return h, h


def lstm(params, carry, x):
    h, c = carry
    i, f, g, o = jnp.split(sum(gates(params, h, x)), 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


@pytest.mark.parametrize("kind, step", [("GRU", gru), ("LSTM", lstm)])
def test_like_torch(kind, step):
    """Outputs, final states, gradients of weights, inputs and initial states."""
    rng = np.random.default_rng(0)
    states = 2 if kind == "LSTM" else 1
    x = rng.normal(size=(N, T, D)).astype(np.float32)
    inits = [rng.normal(size=(2, N, H)).astype(np.float32) for _ in range(states)]
    out_weights = rng.normal(size=(N, T, 2 * H)).astype(np.float32)
    end_weights = [rng.normal(size=(2, N, H)).astype(np.float32) for _ in range(states)]

    torch.manual_seed(0)
    model = getattr(torch.nn, kind)(D, H, batch_first=True, bidirectional=True)
    rows, *starts = (torch.tensor(a, requires_grad=True) for a in (x, *inits))
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        rows, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
    ys, ends = model(packed, tuple(starts) if kind == "LSTM" else starts[0])
    ys = torch.nn.utils.rnn.pad_packed_sequence(ys, True, total_length=T)[0]
    ends = ends if kind == "LSTM" else (ends,)
    loss = (ys * torch.tensor(out_weights)).sum() + sum(
        (end * torch.tensor(w)).sum() for end, w in zip(ends, end_weights, strict=True)
    )
    loss.backward()

    named = dict(model.named_parameters())
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def ours(tensors):
        return tuple(
            {name: jnp.asarray(tensors(f"{name}_l0{direction}")) for name in names}
            for direction in ("", "_reverse")
        )

    def run(params, x, inits):
        pair = tuple(
            tuple(init[i] for init in inits) if kind == "LSTM" else inits[0][i]
            for i in (0, 1)
        )
        carries, outputs = bidirectional_scan(step, params, pair, x, LENGTHS)
        forward, backward = (carry if kind == "LSTM" else (carry,) for carry in carries)
        finals = [jnp.stack(pair) for pair in zip(forward, backward, strict=True)]
        outputs = jnp.concatenate(outputs, -1)
        loss = (outputs * out_weights).sum() + sum(
            (a * w).sum() for a, w in zip(finals, end_weights, strict=True)
        )
        return loss, (outputs, finals)

    params = ours(lambda name: named[name].detach().numpy())
    planted = np.where((np.arange(T) < LENGTHS[:, None])[..., None], x, np.nan)
    step_of_all = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
    (_, got), grads = step_of_all(params, jnp.asarray(planted), inits)
    want = (ys.detach().numpy(), [end.detach().numpy() for end in ends])
    want_grads = (
        ours(lambda name: named[name].grad.numpy()),
        rows.grad.numpy(),
        [start.grad.numpy() for start in starts],
    )
    chex.assert_trees_all_close(got, want, atol=1e-6, rtol=1e-5)
    chex.assert_trees_all_close(grads, want_grads, atol=1e-5, rtol=1e-4)

"""Cells with random parameters, and ragged batches in every encoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]  # N, T, D, and H where it is not D.


def gru(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The step of PyTorch and Flax."""
    xr, xz, xn = jnp.split(x @ params["x"] + params["b"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * (hn + params["n"]))
    h = (1 - z) * n + z * h
    return h, h


def lstm(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    h, c = carry
    gates = x @ params["x"] + h @ params["h"] + params["b"]
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def linear(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = params["n"] * h + x
    return h, h


STEPS = {"GRU": gru, "LSTM": lstm, "linear": linear, "returns": linear}


def random(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)


class Layer(NamedTuple):
    """A cell with its parameters, and a ragged batch."""

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: tuple[Any, ...]  # One for each direction.
    init: Any
    x: jax.Array
    segments: dict[str, jax.Array]
    weights: jax.Array  # Of the outputs.
    axis: int = 1  # Of time, in x, marks and weights.


def ragged(rows: str, n: int, t: int, longest: int) -> dict[str, np.ndarray]:
    """Random segments in every encoding, and the marks that a mask by hand needs.

    A padded row has one segment; a packed row has a segment every 40 steps, as the
    buffers of reinforcement learning do.
    """
    rng, time = np.random.default_rng(1), np.arange(t)
    lengths = np.where(np.arange(n) == 0, longest, rng.integers(1, longest + 1, n))
    starts = np.broadcast_to(time == 0, (n, t))
    valid = time < lengths[:, None]
    if rows == "packed":
        starts, valid = starts | (rng.random((n, t)) < 1 / 40), np.ones((n, t), bool)
    ends = ~valid | np.roll(starts | ~valid, -1, 1)
    ids = (starts.cumsum(1) * valid).astype(np.int32)
    encodings = dict(lengths=lengths.astype(np.int32), segment_ids=ids, starts=starts)
    return encodings | dict(valid=valid, ends=ends)


def layer(
    kind: str,
    shape: Shape,
    directions: int = 1,
    rows: str = "padded",
    longest: int | None = None,
) -> Layer:
    n, t, d, hidden = (*shape, shape[-1])[:4]
    gates = {"GRU": 3, "LSTM": 4}.get(kind, 1) * hidden
    sizes = {"x": (d, gates), "h": (hidden, gates), "b": (gates,), "n": (hidden,)}
    params = [{k: random(*s, seed=i) for k, s in sizes.items()} for i in (0, 1)]
    zeros = jnp.zeros((n, hidden))
    segments = ragged(rows, n, t, longest or t)
    weights = random(n, t, directions * hidden, seed=2) * segments["valid"][..., None]
    axis = 0 if kind == "returns" else 1  # As the buffers lie.

    def lay(x: Any) -> jax.Array:
        return jnp.asarray(np.swapaxes(x, 0, 1 - axis) if x.ndim > 1 else x)

    return Layer(
        step=STEPS[kind],
        params=tuple(params[:directions]),
        init=(zeros, zeros) if kind == "LSTM" else zeros,
        x=lay(random(n, t, d)),
        segments=jax.tree.map(lay, segments),
        weights=lay(weights),
        axis=axis,
    )

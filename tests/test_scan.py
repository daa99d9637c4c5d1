"""The three scans beside a Python loop over rows, segments and steps.

The oracle calls `f` for the valid steps alone. Gradients are compared too, of `init`,
of `xs` and of what `f` closes over, with NaN and infinity in the padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import (
    _reference,
    associative_scan_segments,
    bidirectional_scan,
    scan_segments,
)

N, T, D = 4, 7, 3
LENGTHS = np.array([7, 0, 3, 1])
IDS = np.array(
    [
        [5, 5, 5, 2, 2, 5, 5],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [3, 0, 0, 3, 0, 0, 0],
    ]
)
OFFSETS = np.array([[0, 2, 2, 5], [0, 0, 0, 0], [0, 7, 7, 7], [0, 1, 2, 4]])
MASK = np.array(
    [
        [1, 1, 0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ],
    bool,
)
ENCODINGS = {
    "lengths": dict(lengths=LENGTHS),
    "ids": dict(segment_ids=IDS),
    "ids and padding": dict(segment_ids=IDS, padding_id=0),
    "offsets": dict(cu_seqlens=OFFSETS),
    "mask": dict(mask=MASK),
}
each_encoding = pytest.mark.parametrize("name", ENCODINGS)
each_direction = pytest.mark.parametrize("reverse", (False, True))


def segments_of_row(n, *, lengths=None, segment_ids=None, cu_seqlens=None, mask=None,
                    padding_id=None):  # fmt: skip
    """For each segment of a row, its steps."""
    if lengths is not None:
        return [range(lengths[n])]
    if mask is not None:
        return [np.flatnonzero(mask[n])]
    if cu_seqlens is not None:
        bounds = zip(cu_seqlens[n][:-1], cu_seqlens[n][1:], strict=True)
    else:
        bounds = _reference.id_bounds(segment_ids[n], padding_id)
    return [range(start, end) for start, end in bounds]


def valid_steps(**encoding):
    valid = np.zeros((N, T), bool)
    for n in range(N):
        for steps in segments_of_row(n, **encoding):
            valid[n, list(steps)] = True
    return valid


def oracle(f, init, xs, reverse=False, **encoding):
    """One row, one segment, one step at a time; `f` sees batches of one row."""
    carries, ys = [], []
    for n in range(N):
        start = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], init)
        last, row = start, {}
        segments = [list(steps) for steps in segments_of_row(n, **encoding)]
        for steps in reversed(segments) if reverse else segments:
            carry = start
            for t in reversed(steps) if reverse else steps:
                x = jax.tree.map(lambda leaf, n=n, t=t: leaf[n : n + 1, t], xs)
                carry, row[t] = f(carry, x)
                last = carry
        carries.append(last)
        ys.append(row)
    some = next((y for row in ys for y in row.values()), None)
    zero = jax.tree.map(jnp.zeros_like, some)
    rows = [
        jax.tree.map(lambda *y: jnp.stack(y, 1), *(row.get(t, zero) for t in range(T)))
        for row in ys
    ]
    concatenate = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    return concatenate(*carries), concatenate(*rows)


def gru(w, carry, x):
    """A pytree carry of two dtypes, and a step that depends on both inputs."""
    h, count = carry
    z = jax.nn.sigmoid(x["a"] @ w["z"] + h)
    h = (1 - z) * h + z * jnp.tanh(x["a"] @ w["h"] + x["b"][:, None])
    return (h, count + 1), {"h": h, "count": count}


def norm(w, carry, x):
    """The derivative is infinite where x is 0, and where the carry is 0."""
    h, count = carry
    size = jnp.sqrt(jnp.sum((x["a"] @ w["z"]) ** 2, -1, keepdims=True))
    h = jnp.sqrt(h**2 + size) * jnp.log(1 + size) / x["b"][:, None]
    return (h, count), {"h": h, "log": jnp.log(h)}


def make(bad=np.nan, **encoding):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(0.5, 1.5, shape).astype(np.float32)  # noqa: E731
    w = {"z": draw(D, 2), "h": draw(D, 2)}
    init = (draw(N, 2), np.arange(N, dtype=np.int32))
    xs = {"a": draw(N, T, D), "b": draw(N, T)}
    valid = valid_steps(**encoding)
    for x in xs.values():
        x[~valid] = bad
    return w, init, xs


def weighted(carry, ys):
    """A scalar of all floating results, in which each counts differently."""
    leaves = [x for x in jax.tree.leaves((carry, ys)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in leaves)


def close(actual, desired):
    same = jax.tree.structure(actual) == jax.tree.structure(desired)
    assert same, (actual, desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@each_encoding
@each_direction
@pytest.mark.parametrize("f", (gru, norm))
@pytest.mark.parametrize("bad", (np.nan, np.inf, 0.0))
def test_values_and_gradients_are_those_of_valid_steps_alone(name, reverse, f, bad):
    encoding = ENCODINGS[name]
    w, init, xs = make(bad, **encoding)
    clean = make(1.0, **encoding)[2]

    def loss(scan, w, h, xs, **encoding):
        out = scan(partial(f, w), (h, init[1]), xs, reverse=reverse, **encoding)
        return weighted(*out), out

    def run(scan, xs, **encoding):
        grad = jax.value_and_grad(partial(loss, scan), (0, 1, 2), has_aux=True)
        (_, out), grads = grad(w, init[0], xs, **encoding)
        return out, grads

    on_device = {k: jnp.asarray(v) for k, v in encoding.items() if k != "padding_id"}
    static = {k: v for k, v in encoding.items() if k == "padding_id"}
    ours = jax.jit(lambda xs, device: run(scan_segments, xs, **device, **static))
    close(ours(xs, on_device), run(oracle, clean, **encoding))

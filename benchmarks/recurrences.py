"""Recurrences over ragged rows: this library beside `jax.lax` and Flax.

Each way is timed forward, and as the gradient of a weighted sum of its outputs with
respect to parameters and inputs. The weights are zero at padding, so ways that agree at
valid steps have the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.timing import Contender, Options, Row, gather, measure, repeat
from jax_revseg import (
    associative_scan_segments,
    bidirectional,
    bidirectional_scan,
    reverse_segments,
    scan_segments,
)

SCAN, ASSOCIATIVE, TWO_SCANS = "lax.scan", "lax.associative_scan", "two scan_segments"

Shape = tuple[int, ...]  # N, T, D, and H where there is a cell.
Way = Callable[..., jax.Array]  # Of parameters, x and the segments.


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


STEPS = {"GRU": gru, "LSTM": lstm, "linear": linear}


def random(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)


class Layer(NamedTuple):
    """A cell with its parameters, and a ragged batch."""

    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    params: tuple[Any, ...]  # One for each direction.
    init: Any
    x: jax.Array
    lengths: jax.Array
    valid: jax.Array  # (N, T)
    weights: jax.Array  # Of the outputs.


def layer(kind: str, shape: Shape, directions: int) -> Layer:
    n, t, d, hidden = shape
    gates = {"GRU": 3, "LSTM": 4, "linear": 1}[kind] * hidden
    sizes = {"x": (d, gates), "h": (hidden, gates), "b": (gates,), "n": (hidden,)}
    params = [{k: random(*s, seed=i) for k, s in sizes.items()} for i in (0, 1)]
    zeros = jnp.zeros((n, hidden))
    lengths = np.random.default_rng(1).integers(1, t + 1, n)
    valid = np.arange(t) < lengths[:, None]
    return Layer(
        step=STEPS[kind],
        params=tuple(params[:directions]),
        init=(zeros, zeros) if kind == "LSTM" else zeros,
        x=random(n, t, d),
        lengths=jnp.asarray(lengths, jnp.int32),
        valid=jnp.asarray(valid),
        weights=random(n, t, directions * hidden, seed=2) * valid[..., None],
    )


def of_jax(
    ways: dict[str, Way],
    operands: tuple[Any, ...],
    weights: Any,
    compared: str = "valid",
) -> Iterator[Contender]:
    """Each way, forward and gradient; XLA would evaluate constants beforehand."""
    for name, way in ways.items():

        def loss(*operands: Any, way: Way = way) -> jax.Array:
            return jnp.sum(way(*operands) * weights)

        functions = {"forward": way, "gradient": jax.grad(loss, (0, 1))}
        for direction, function in functions.items():
            call = partial(jax.jit(function), *operands)
            yield Contender(name, repeat(call), "new", direction, compared)


def check_alike(contenders: list[Contender], weights: jax.Array) -> None:
    """Raises unless outputs at valid steps, and gradients, are the same for all."""

    def result(contender: Contender) -> Any:
        out = contender.run(1)
        return out * (weights != 0) if contender.direction == "forward" else out

    compared = [c for c in contenders if c.compared != "none"]
    right = {c.direction: jax.tree.leaves(result(c)) for c in compared[-2:]}
    for c in compared:
        for a, b in zip(jax.tree.leaves(result(c)), right[c.direction], strict=True):
            if not jnp.allclose(a, b, 1e-3, 1e-4 * float(1 + abs(b).max())):
                raise AssertionError(f"{c} computes something else")


def run_scan(step: Any, init: Any, xs: Any) -> jax.Array:
    """`lax.scan` of batch-major arrays."""
    xs = jax.tree.map(lambda x: x.swapaxes(0, 1), xs)
    return lax.scan(step, init, xs)[1].swapaxes(0, 1)


def measure_scan(kind: str, shape: Shape, options: Options) -> Row:
    """What raggedness costs: `lax.scan` takes padding for steps."""
    step, params, init, x, lengths, valid, weights = layer(kind, shape, 1)

    def masked(params: Any, x: jax.Array, segments: Any) -> jax.Array:
        def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, valid = inputs
            new, y = step(params, carry, x)
            held = jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, carry)
            return held, jnp.where(valid, y, 0)

        return run_scan(body, init, (x, segments["valid"][..., None]))

    def ragged(params: Any, x: jax.Array, **encoding: Any) -> jax.Array:
        return scan_segments(partial(step, params), init, x, **encoding)[1]

    segments = dict(valid=valid, lengths=lengths, ids=valid.astype(jnp.int32))
    ways: dict[str, Way] = {
        SCAN: lambda params, x, segments: run_scan(partial(step, params), init, x),
        "mask by hand": masked,
        "scan_segments": lambda params, x, segments: ragged(
            params, x, lengths=segments["lengths"]
        ),
        "scan_segments, ids": lambda params, x, segments: ragged(
            params, x, segment_ids=segments["ids"], padding_id=0
        ),
    }
    own = [*of_jax(ways, (params[0], x, segments), weights)]
    check_alike(own, weights)
    return dict(group="scan", **measure(options, [SCAN], own))


def measure_associative(shape: Shape, options: Options) -> Row:
    """Discounted returns of packed episodes, which run backward in time."""
    x, weights = random(*shape), random(*shape, seed=1)
    ends = np.random.default_rng(2).random(shape[:2]) < 1 / 40
    ids = jnp.asarray(np.roll(ends, 1, 1).cumsum(1), jnp.int32)
    params = jax.nn.sigmoid(random(shape[2]))
    other = ids[:, 1:] != ids[:, :-1]
    segments = {  # The last and the first step of an episode.
        "ids": ids,
        "last": jnp.pad(other, ((0, 0), (0, 1)), constant_values=True),
        "first": jnp.pad(other, ((0, 0), (1, 0)), constant_values=True),
    }

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(decay: Any, x: Any, reverse: bool) -> jax.Array:
        decay = jnp.broadcast_to(decay, x.shape)
        return lax.associative_scan(combine, (decay, x), axis=1, reverse=reverse)[1]

    def reset(decay: Any, x: Any, resets: Any, reverse: bool) -> jax.Array:
        return scan(jnp.where(resets[..., None], 0, decay), x, reverse)

    def ragged(decay: Any, x: Any, segments: Any) -> jax.Array:
        elems = jnp.broadcast_to(decay, x.shape), x
        scan = partial(associative_scan_segments, combine, reverse=True)
        return scan(elems, segment_ids=segments["ids"])[1]

    def reversing(decay: Any, x: Any, segments: Any) -> jax.Array:
        reverse = partial(reverse_segments, segment_ids=segments["ids"])
        return reverse(reset(decay, reverse(x), segments["first"], False))

    base: dict[str, Way] = {ASSOCIATIVE: lambda decay, x, _: scan(decay, x, True)}
    ways: dict[str, Way] = {
        "decay reset by hand": lambda decay, x, segments: reset(
            decay, x, segments["last"], True
        ),
        "associative_scan_segments": ragged,
        "reverse, scan, reverse": reversing,
    }
    operands = params, x, segments
    own = [*of_jax(base, operands, weights, "none"), *of_jax(ways, operands, weights)]
    check_alike(own, weights)
    return dict(group="associative", **measure(options, [ASSOCIATIVE], own))


def measure_bidirectional(kind: str, shape: Shape, options: Options) -> Row:
    """One loop beside two, and beside Flax."""
    data = layer(kind, shape, 2)
    step, params, init, x, lengths, _, weights = data

    def one_loop(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        ys = bidirectional_scan(step, params, (init, init), x, lengths)[1]
        return jnp.concatenate(ys, -1)

    def two_loops(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        fs = [partial(step, own) for own in params]
        forward = scan_segments(fs[0], init, x, lengths)[1]
        backward = scan_segments(fs[1], init, x, lengths, reverse=True)[1]
        return jnp.concatenate([forward, backward], -1)

    def reversing(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        layers = [partial(run_scan, partial(step, own), init) for own in params]
        return bidirectional(*layers)(x, lengths)

    ways = {
        TWO_SCANS: two_loops,
        "bidirectional_scan": one_loop,
        "bidirectional": reversing,
    }
    own = [*of_jax(ways, (params, x, lengths), weights)]
    check_alike(own, weights)
    found, absent = gather({"Flax NNX": _flax(kind, data)}, lambda c: c.run(1))
    row = measure(options, [TWO_SCANS], [*own, *found])
    return dict(group="bidirectional", absent=absent, **row)


def _flax(kind: str, data: Layer) -> Iterator[Contender]:
    from flax import nnx

    rngs, (d, hidden) = nnx.Rngs(0), (data.x.shape[-1], data.weights.shape[-1] // 2)
    cell = {"GRU": nnx.GRUCell, "LSTM": nnx.OptimizedLSTMCell}[kind]
    layers = [nnx.RNN(cell(d, hidden, rngs=rngs), rngs=False) for _ in range(2)]
    both = nnx.Bidirectional(*layers, rngs=False)
    structure, params, rest = nnx.split(both, nnx.Param, ...)

    def run(params: Any, x: jax.Array, lengths: Any) -> Any:
        carries = data.init, data.init
        model = nnx.merge(structure, params, rest)
        return model(x, seq_lengths=lengths, initial_carry=carries)

    operands = params, data.x, data.lengths
    yield from of_jax({"Flax NNX": run}, operands, data.weights, "none")

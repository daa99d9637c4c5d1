"""Recurrences over ragged rows: this library beside `jax.lax` and Flax.

Each way is timed forward, and as the gradient of a weighted sum of its outputs with
respect to parameters and inputs. The weights are zero at padding, so ways that agree at
valid steps have the same gradient. The segments are operands: XLA evaluates constants
before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cells import Layer, Shape, layer, linear, ragged, random
from benchmarks.timing import Contender, Options, Row, gather, measure, repeat
from jax_revseg import (
    associative_scan_segments,
    bidirectional,
    bidirectional_scan,
    scan_segments,
)

SCAN, ASSOCIATIVE, TWO_SCANS = "lax.scan", "lax.associative_scan", "two scan_segments"
CHUNK = "chunk"

Way = Callable[..., jax.Array]  # Of parameters, x and the segments.


def by_encoding(function: str, rows: str, call: Way) -> dict[str, Way]:
    """One way for each encoding that says these rows; `call` takes it by keyword."""
    names = {"lengths": "", "segment_ids": ", ids", "starts": ", starts"}
    del names["starts" if rows == "padded" else "lengths"]
    more = {"segment_ids": {"padding_id": 0}} if rows == "padded" else {}

    def way(name: str) -> Way:
        return lambda params, x, segments: call(
            params, x, **{name: segments[name]}, **more.get(name, {})
        )

    return {function + suffix: way(name) for name, suffix in names.items()}


def gradient(way: Way, weights: jax.Array) -> Way:
    return jax.grad(lambda *operands: jnp.sum(way(*operands) * weights), (0, 1))


def of_jax(
    ways: dict[str, Way],
    operands: tuple[Any, ...],
    weights: Any,
    compared: str = "valid",
) -> Iterator[Contender]:
    """Each way, forward and gradient."""
    for name, way in ways.items():
        functions = {"forward": way, "gradient": gradient(way, weights)}
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


def temporaries(ways: dict[str, Way], operands: Any, weights: Any) -> dict[str, int]:
    """The temporary memory of each way's gradient, in bytes."""

    def size(way: Way) -> int:
        compiled = jax.jit(gradient(way, weights)).lower(*operands).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    return {name: size(way) for name, way in ways.items()}


def run_scan(step: Any, init: Any, xs: Any, axis: int = 1, reverse: bool = False):
    """`lax.scan` along an axis."""
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), xs)
    return jnp.moveaxis(lax.scan(step, init, xs, reverse=reverse)[1], 0, axis)


def measure_scan(kind: str, shape: Shape, options: Options) -> Row:
    """What raggedness costs: `lax.scan` takes padding and starts for steps."""
    cell, rows = kind.split()[-1], "packed" if "packed" in kind else "padded"
    step, params, init, x, segments, weights, axis = layer(cell, shape, rows=rows)
    reverse = cell == "returns"

    def plain(params: Any, x: jax.Array, segments: Any) -> jax.Array:
        return run_scan(partial(step, params), init, x, axis, reverse)

    def by_hand(params: Any, x: jax.Array, segments: Any) -> jax.Array:
        def choose(mask: jax.Array, a: Any, b: Any) -> Any:
            return jax.tree.map(partial(jnp.where, mask), a, b)

        def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
            x, marked = inputs
            if rows == "packed":
                return step(params, choose(marked, init, carry), x)
            new, y = step(params, carry, x)
            return choose(marked, new, carry), choose(marked, y, jnp.zeros_like(y))

        marks = "valid" if rows == "padded" else "ends" if reverse else "starts"
        return run_scan(body, init, (x, segments[marks][..., None]), axis, reverse)

    def ours(params: Any, x: jax.Array, **more: Any) -> jax.Array:
        f = partial(step, params)
        return scan_segments(f, init, x, axis=axis, reverse=reverse, **more)[1]

    operands = params[0], x, segments
    base = {SCAN: plain}
    ways = {"mask by hand": by_hand, **by_encoding("scan_segments", rows, ours)}
    # From the end of a row, and over several segments, lax.scan gives other values.
    compared = "none" if reverse or rows == "packed" else "valid"
    own = [*of_jax(base, operands, weights, compared), *of_jax(ways, operands, weights)]
    check_alike(own, weights)
    memory = temporaries(base | ways, operands, weights)
    row = measure(options, [SCAN], own)
    return dict(group="scan", gradient_bytes=memory, **row)


def measure_chunk(part: str, shape: Shape, options: Options) -> Row:
    """What chunks save if the longest row takes a part of the padded size."""
    size = shape[1]
    longest = {"all": size, "half": size // 2, "quarter": size // 4}[part]
    data = layer("GRU", shape, longest=longest)
    step, params, init, x, segments, weights, _ = data

    def way(chunk: int | None) -> Way:
        def run(params: Any, x: jax.Array, segments: Any) -> jax.Array:
            f, lengths = partial(step, params), segments["lengths"]
            return scan_segments(f, init, x, lengths, chunk=chunk)[1]

        return run

    ways: dict[str, Way] = {
        SCAN: lambda params, x, segments: run_scan(partial(step, params), init, x),
        "scan_segments": way(None),
        CHUNK: way(size // 16),
    }
    operands = params[0], x, segments
    own = [*of_jax(ways, operands, weights)]
    check_alike(own, weights)
    found, absent = gather({"Flax NNX": _flax("GRU", data)}, lambda c: c.run(1))
    memory = temporaries(ways, operands, weights)
    row = measure(options, [SCAN], [*own, *found])
    return dict(group="chunk", gradient_bytes=memory, absent=absent, **row)


def measure_associative(rows: str, shape: Shape, options: Options) -> Row:
    """Discounted returns, which run backward in time."""
    x, weights = random(*shape), random(*shape, seed=1)
    n, t, features = shape
    params = jax.nn.sigmoid(random(features))
    segments = jax.tree.map(jnp.asarray, ragged(rows, n, t, t))
    weights *= segments["valid"][..., None]

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(decay: Any, x: Any) -> jax.Array:
        decay = jnp.broadcast_to(decay, x.shape)
        return lax.associative_scan(combine, (decay, x), axis=1, reverse=True)[1]

    def reset(decay: Any, x: Any, segments: Any) -> jax.Array:
        return scan(jnp.where(segments["ends"][..., None], 0, decay), x)

    def ours(decay: Any, x: Any, **more: Any) -> jax.Array:
        elems = jnp.broadcast_to(decay, x.shape), x
        return associative_scan_segments(combine, elems, reverse=True, **more)[1]

    def loop(decay: Any, x: Any, segments: Any) -> jax.Array:
        step, init = partial(linear, {"n": decay}), jnp.zeros((n, features))
        name = "lengths" if rows == "padded" else "starts"
        return scan_segments(step, init, x, **{name: segments[name]}, reverse=True)[1]

    base: dict[str, Way] = {ASSOCIATIVE: lambda decay, x, _: scan(decay, x)}
    ways: dict[str, Way] = {
        "decay reset by hand": reset,
        **by_encoding("ours", rows, ours),
        "scan_segments": loop,
    }
    operands = params, x, segments
    own = [*of_jax(base, operands, weights, "none"), *of_jax(ways, operands, weights)]
    check_alike(own, weights)
    memory = temporaries(base | ways, operands, weights)
    row = measure(options, [ASSOCIATIVE], own)
    return dict(group="associative", gradient_bytes=memory, **row)


def measure_bidirectional(kind: str, shape: Shape, options: Options) -> Row:
    """One loop beside two, and beside Flax."""
    data = layer(kind, shape, 2)
    step, params, init, x, segments, weights, _ = data
    lengths = segments["lengths"]

    def one_loop(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        ys = bidirectional_scan(step, params, (init, init), x, lengths)[1]
        return jnp.concatenate(ys, -1)

    def two_loops(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        fs = [partial(step, own) for own in params]
        forward = scan_segments(fs[0], init, x, lengths)[1]
        backward = scan_segments(fs[1], init, x, lengths, reverse=True)[1]
        return jnp.concatenate([forward, backward], -1)

    def reversing(params: Any, x: jax.Array, lengths: Any) -> jax.Array:
        a, b = (partial(run_scan, partial(step, own), init) for own in params)
        return bidirectional(a, b, x, lengths)

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
    """Flax's RNN, in one direction or in both."""
    from flax import nnx

    rngs, directions = nnx.Rngs(0), len(data.params)
    sizes = data.x.shape[-1], data.weights.shape[-1] // directions
    cell = {"GRU": nnx.GRUCell, "LSTM": nnx.OptimizedLSTMCell}[kind]
    layers = [nnx.RNN(cell(*sizes, rngs=rngs), rngs=False) for _ in data.params]
    both = directions == 2
    layer = nnx.Bidirectional(*layers, rngs=False) if both else layers[0]
    structure, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(params: Any, x: jax.Array, lengths: Any) -> Any:
        carry = (data.init, data.init) if both else data.init
        model = nnx.merge(structure, params, rest)
        return model(x, seq_lengths=lengths, initial_carry=carry)

    operands = params, data.x, data.segments["lengths"]
    yield from of_jax({"Flax NNX": run}, operands, data.weights, "none")

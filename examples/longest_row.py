"""Padding that costs no time: a GRU's time against the longest row of the batch.

JAX pads all batches to one size, so that it compiles once. `lax.scan` and Flax's RNN
take every step of that size. `scan_segments` with `chunk` skips the chunks in which no
row has a valid step, so its time follows the longest row, and its gradient keeps the
states at the starts of chunks alone.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import COLORS, HALO, LEFT, RIGHT, line, page, text

from jax_revseg import scan_segments

ROWS, FEATURES, HIDDEN, CHUNK = 64, 64, 128, 32


def gru(params, h, x):
    """One step of all rows."""
    xr, xz, xn = jnp.split(x @ params["x"] + params["b"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return h, h


def layers(rng):
    """Each layer, a function of parameters, x and lengths, and its parameters."""
    from flax import nnx  # Here, because the pictures are drawn without Flax.

    zeros = jnp.zeros((ROWS, HIDDEN))
    shapes = {"x": (FEATURES, 3 * HIDDEN), "h": (HIDDEN, 3 * HIDDEN), "b": 3 * HIDDEN}
    params = {k: jnp.asarray(rng.normal(size=s) / 8, "f") for k, s in shapes.items()}

    def plain(params, x, lengths):
        ys = jax.lax.scan(partial(gru, params), zeros, x.swapaxes(0, 1))[1]
        return ys.swapaxes(0, 1)

    def chunked(params, x, lengths):
        return scan_segments(partial(gru, params), zeros, x, lengths, chunk=CHUNK)[1]

    cell = nnx.GRUCell(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
    structure, weights, rest = nnx.split(nnx.RNN(cell, rngs=False), nnx.Param, ...)

    def flax(weights, x, lengths):
        rnn = nnx.merge(structure, weights, rest)
        return rnn(x, initial_carry=zeros, seq_lengths=lengths)

    return {
        "lax.scan": (plain, params),
        "Flax's nnx.RNN": (flax, weights),
        f"scan_segments, chunk={CHUNK}": (chunked, params),
    }


def gradient(f):
    return jax.grad(lambda *operands: jnp.mean(f(*operands) ** 2), (0, 1))


def measure(steps, longest, rounds):
    """The median ms of each layer for each longest row; all take turns."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, steps, FEATURES)), "f")
    shares = np.append(1, rng.random(ROWS - 1))
    found: dict[str, Any] = {"steps": steps, "longest": longest, "MB": {}}
    for name, way in (("forward", lambda f: f), ("gradient", gradient)):
        print(f"compiling and timing: {name}", flush=True)
        compiled = {}
        for layer, (f, params) in layers(rng).items():
            program = jax.jit(way(f)).lower(params, x, jnp.zeros(ROWS, int)).compile()
            memory: Any = program.memory_analysis()
            found["MB"][layer] = round(memory.temp_size_in_bytes / 1e6, 1)
            compiled[layer] = partial(program, params, x)
        ms = {layer: [[] for _ in longest] for layer in compiled}
        for turn in range(rounds + 1):  # The first only warms up.
            for i, most in enumerate(longest):
                lengths = jnp.asarray(np.ceil(shares * most), int)
                for layer, run in compiled.items():
                    start = time.perf_counter()
                    jax.block_until_ready(run(lengths))
                    if turn:
                        ms[layer][i].append(1e3 * (time.perf_counter() - start))
        found[name] = {k: [round(np.median(t), 2) for t in v] for k, v in ms.items()}
    return found


def panel(results, name, top):
    """The curves of the forward pass or of the gradient."""
    left, height, curves = LEFT + 8, 140, results[name]
    highest = max(max(curve) for curve in curves.values())
    ticks = [f * 10.0**e for e in range(-3, 6) for f in (1, 2, 5)]
    tick = next(tick for tick in ticks if highest <= 5 * tick)

    def point(longest, ms):
        x = left + (RIGHT - left) * longest / results["steps"]
        return x, top + height * (1 - ms / (5 * tick))

    parts = [text(14, top - 14, f"{name}, ms", 16)]
    for ms in tick * np.arange(6):
        y = point(0, ms)[1]
        parts.append(line([(left, y), (RIGHT, y)], "#dddddd", 1))
        parts.append(text(left - 6, y + 5, f"{ms:g}", 14, anchor="end"))
    for steps in results["longest"]:
        parts.append(text(point(steps, 0)[0], top + 160, steps, 14, anchor="middle"))
    for curve, color in zip(curves.values(), COLORS, strict=True):
        parts.append(line(map(point, results["longest"], curve), color, 3))
    return parts


def picture(results):
    """The forward pass above the gradient, and the names of the layers."""
    words = f"steps of the longest row (rows are padded to {results['steps']})"
    parts = [text(RIGHT, 438, words, anchor="end")]
    parts += panel(results, "forward", 40) + panel(results, "gradient", 256)
    for i, (layer, color) in enumerate(zip(results["forward"], COLORS, strict=True)):
        parts.append(text(LEFT + 8, 466 + 20 * i, layer, 15, color, extra=HALO))
    return page(480, 520, parts)


def main():
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--rounds", type=int, default=9, help="of timing; default 9")
    parser.add_argument("--output", type=Path, default=here / "output", help="folder")
    args = parser.parse_args()
    steps, rounds = (2 * CHUNK, 1) if args.quick else (512, args.rounds)
    results = measure(steps, [steps * i // 8 for i in (1, 2, 4, 6, 8)], rounds)
    for name in "forward", "gradient":
        print(f"\n{name + ', ms':26}" + "".join(f"{n:8}" for n in results["longest"]))
        for layer, ms in results[name].items():
            print(f"{layer:26}" + "".join(f"{value:8.1f}" for value in ms))
    print("\ntemporary memory of the gradient, MB:", results["MB"])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "chunk.json").write_text(json.dumps(results) + "\n")
    (args.output / "chunk.svg").write_text(picture(results))
    print(f"As curves: {args.output}/chunk.svg")


if __name__ == "__main__":
    main()

"""A bidirectional GRU on ragged rows: one loop, two scans, Flax and PyTorch.

    python -m benchmarks.rnn [--quick] [--seconds 20] [--json FILE]

The step is a forward pass, or the gradient of a weighted sum of its outputs with
respect to parameters and inputs. What is not installed is left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Contender, Samples, take_turns
from jax_revseg import bidirectional, bidirectional_scan, reverse_sequence

SHAPES = ((32, 128, 32, 64), (64, 128, 64, 256), (8, 512, 32, 64))  # N, T, D, H
QUICK = ((4, 16, 8, 8),)


def gru(params: Any, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """PyTorch's step, which is also Flax's: x enters inside the loop, as with any f."""
    xr, xz, xn = jnp.split(x @ params["x"] + params["b"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * (hn + params["n"]))
    h = (1 - z) * n + z * h
    return h, h


def _one_loop(params: Any, x: jax.Array, lengths: jax.Array, h: jax.Array) -> Any:
    return jnp.concatenate(bidirectional_scan(gru, params, h, x, lengths)[1], -1)


def _two_scans(params: Any, x: jax.Array, lengths: jax.Array, h: jax.Array) -> Any:
    def layer(own: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(partial(gru, own), h, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return bidirectional(*(partial(layer, own) for own in params))(x, lengths)


def _nnx(d: int, hidden: int) -> tuple[Callable[..., Any], Any]:
    from flax import nnx

    rngs = nnx.Rngs(0)
    layers = [nnx.RNN(nnx.GRUCell(d, hidden, rngs=rngs), rngs=False) for _ in range(2)]
    structure, params, rest = nnx.split(
        nnx.Bidirectional(*layers, rngs=False), nnx.Param, ...
    )

    def run(params: Any, x: jax.Array, lengths: jax.Array, h: jax.Array) -> Any:
        model = nnx.merge(structure, params, rest)
        return model(x, seq_lengths=lengths, initial_carry=(h, h))

    return run, params


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        jax.block_until_ready(call())


def _jax_contenders(
    name: str, run: Callable[..., Any], params: Any, x: Any, weights: Any, *rest: Any
) -> list[Contender]:
    def loss(params: Any, x: jax.Array, weights: jax.Array, *rest: Any) -> jax.Array:
        return jnp.sum(run(params, x, *rest) * weights)

    forward, step = jax.jit(run), jax.jit(jax.grad(loss, (0, 1)))

    calls = {
        "forward": lambda: forward(params, x, *rest),
        "gradient": lambda: step(params, x, weights, *rest),
    }
    return [
        Contender(name, partial(_repeat, call), "fresh", direction)
        for direction, call in calls.items()
    ]


def _torch_contenders(x: Any, weights: Any, lengths: Any, h: Any) -> list[Contender]:
    torch = importlib.import_module("torch")  # No type checker need know it.

    n, _, d = x.shape
    model = torch.nn.GRU(d, h.shape[-1], batch_first=True, bidirectional=True)
    rows = torch.tensor(np.asarray(x), requires_grad=True)
    sizes, upstream = torch.tensor(np.asarray(lengths)), torch.tensor(weights)
    pack = partial(
        torch.nn.utils.rnn.pack_padded_sequence, batch_first=True, enforce_sorted=False
    )
    unpack = partial(
        torch.nn.utils.rnn.pad_packed_sequence,
        batch_first=True,
        total_length=rows.shape[1],
    )

    def run() -> Any:
        return unpack(model(pack(rows, sizes))[0])[0]

    def forward(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                run()

    def gradient(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad((run() * upstream).sum(), [rows, *model.parameters()])

    return [
        Contender("PyTorch packed", forward, "fresh", "forward"),
        Contender("PyTorch packed", gradient, "fresh", "gradient"),
    ]


def contenders(shape: tuple[int, int, int, int]) -> list[Contender]:
    """All ways that are installed, each forward and with the gradient."""
    n, t, d, hidden = shape
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)

    gates = 3 * hidden
    params = tuple(
        {
            "x": random(d, gates),
            "h": random(hidden, gates),
            "b": random(gates),
            "n": random(hidden),
        }
        for _ in range(2)
    )
    x, h = random(n, t, d), jnp.zeros((n, hidden))
    lengths = jnp.asarray(rng.integers(1, t + 1, n), jnp.int32)
    valid = np.arange(t) < np.asarray(lengths)[:, None]
    weights = (rng.normal(size=(n, t, 2 * hidden)) * valid[..., None]).astype("float32")
    given = (x, jnp.asarray(weights), lengths, h)

    out = _jax_contenders("bidirectional_scan", _one_loop, params, *given)
    out += _jax_contenders("two scans", _two_scans, params, *given)
    # What two scans reverse: inputs and backward outputs, and then their cotangents.
    arrays = [x, jnp.asarray(weights[..., :hidden])]
    reverse = jax.jit(lambda arrays: [reverse_sequence(a, lengths) for a in arrays])
    for direction, some in {"forward": arrays, "gradient": arrays * 2}.items():
        call = partial(_repeat, partial(reverse, some))
        out.append(Contender("the reversals alone", call, "fresh", direction))
    if importlib.util.find_spec("flax"):
        out += _jax_contenders("Flax NNX Bidirectional", *_nnx(d, hidden), *given)
    if importlib.util.find_spec("torch"):
        out += _torch_contenders(x, weights, lengths, h)
    return out


def summary(shape: tuple[int, ...], samples: Samples) -> list[dict[str, Any]]:
    """A row for each way: the median in ms, its spread, the ratio to ours by round."""
    rows = []
    for (name, regime, direction), seconds in samples.items():
        ours = samples["bidirectional_scan", regime, direction]
        low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
        rows.append(
            {
                "shape": list(shape),
                "name": name,
                "direction": direction,
                "ms": round(float(middle), 4),
                "quartiles_ms": [round(float(low), 4), round(float(high), 4)],
                "least_ms": round(float(1e3 * seconds.min()), 4),
                "ratio_to_ours": round(float(np.median(seconds / ours)), 3),
                "rounds": len(seconds),
            }
        )
    return rows


def measure(seconds: float = 20, quick: bool = False) -> list[dict[str, Any]]:
    """Times every shape for so many seconds; what `python -m benchmarks` calls."""
    rows = []
    for shape in QUICK if quick else SHAPES:
        samples = take_turns(contenders(shape), 1 if quick else seconds)
        rows += summary(shape, samples)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--seconds", type=float, default=20, help="for each shape")
    parser.add_argument("--json", help="a file for the figures")
    args = parser.parse_args()
    missing = [m for m in ("flax", "torch") if importlib.util.find_spec(m) is None]
    for module in missing:
        print(f"{module} is not installed: left out")
    rows = measure(args.seconds, args.quick)
    print(f"{'(N, T, D, H)':20}{'':24}{'ms':>18}{'quartiles':>20}{'x ours':>8}")
    for row in sorted(rows, key=lambda row: (row["shape"], row["direction"])):
        low, high = row["quartiles_ms"]
        print(
            f"{str(tuple(row['shape'])):20}{row['name']:24}{row['direction']:>9}"
            f"{row['ms']:9.2f}{low:10.2f}{high:10.2f}{row['ratio_to_ours']:8.2f}"
        )
    if args.json:
        figures = {
            "jax": jax.__version__,
            "device": str(jax.devices()[0]),
            "rows": rows,
        }
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()

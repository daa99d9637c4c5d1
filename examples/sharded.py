"""Packed documents that cross the blocks of a sequence sharded over devices.

Each device holds a block of the segment axis. A bidirectional state space layer, the
diagonal linear recurrence h[t] = decay * h[t - 1] + x[t] in both directions, starts
anew at every document, and goes on where a document crosses into the next block. With
`axis_name` the blocks of `associative_scan_segments` exchange one state a row.
`bidirectional` runs a layer that only goes forward, and exchanges whole blocks.

A loop over the documents, one by one, says what is right. The devices are simulated.
"""

import argparse
import os
import time
from functools import partial
from typing import Any


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument("--length", type=int, default=4096, help="of each row")
    parser.add_argument("--quick", dest="length", action="store_const", const=256)
    args = parser.parse_args()
    if args.length % args.devices:
        parser.error(f"--length {args.length} must be a multiple of {args.devices}")
    return args


ROWS, FEATURES, ARGS = 4, 64, arguments()
# The number of devices must be set before JAX starts.
DEVICES = f" --xla_force_host_platform_device_count={ARGS.devices}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + DEVICES

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

from jax_revseg import associative_scan_segments, bidirectional  # noqa: E402


def states(decay, ids, x, **more):
    """h of each document, all steps at once; `more` is the direction and the axis."""

    def combine(before, now):
        return before[0] * now[0], now[0] * before[1] + now[1]

    elems = jnp.broadcast_to(jax.nn.sigmoid(decay), x.shape), x
    return associative_scan_segments(combine, elems, segment_ids=ids, **more)[1]


def two_scans(params, x, ids, axis_name=None):
    forward = states(params[0], ids, x, axis_name=axis_name)
    backward = states(params[1], ids, x, axis_name=axis_name, reverse=True)
    return jnp.concatenate([forward, backward], -1)


def reversing(params, x, ids, axis_name=None):
    # Documents keep their places, so both layers start anew at the same ids.
    forward, backward = (partial(states, a, ids, axis_name=axis_name) for a in params)
    return bidirectional(forward, backward, x, segment_ids=ids, axis_name=axis_name)


def one_by_one(params, x, ids):
    """The definition, in NumPy and double precision."""
    out = np.zeros((2, *x.shape))
    for direction, decay in enumerate(1 / (1 + np.exp(-np.array(params)))):
        for n, row in enumerate(ids):
            for number in np.unique(row):
                where, h = np.flatnonzero(row == number), np.zeros(FEATURES)
                for t in where[::-1] if direction else where:
                    out[direction, n, t] = h = decay * h + x[n, t]
    return np.concatenate(out, -1)


def measure(f, *operands):
    """The gradient and the output, MB that a device holds, ms, and what is sent."""

    def loss(params, x, ids):
        y = f(params, x, ids)
        return jnp.mean(y**2), y

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    compiled = gradient.lower(*operands).compile()
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    text = str(compiled.as_text())
    kinds = "all-reduce", "all-gather", "all-to-all", "reduce-scatter"
    kinds = [k for k in (*kinds, "collective-permute") if f" {k}(" in text]
    sent = ", ".join(f"{text.count(f' {kind}(')} {kind}" for kind in kinds)
    result = jax.block_until_ready(compiled(*operands))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*operands))
    seconds = time.perf_counter() - start
    held = (held + memory.temp_size_in_bytes) / 1e6
    return result, (held, 1e3 * seconds, sent or "none")


def main():
    mesh = jax.make_mesh((ARGS.devices,), ("seq",), axis_types=(AxisType.Auto,))
    rng, shape = np.random.default_rng(0), (ROWS, ARGS.length, FEATURES)
    x = rng.normal(size=shape).astype(np.float32)
    starts = rng.random(shape[:2]) < 16 / ARGS.length  # Half a block a document.
    ids = starts.cumsum(1, dtype=np.int32)
    documents = len(np.unique(ids + np.arange(ROWS)[:, None] * ARGS.length))
    params = tuple(rng.uniform(1, 4, (2, FEATURES)).astype(np.float32))
    edges = np.arange(1, ARGS.devices) * (ARGS.length // ARGS.devices)
    crossed = (ids[:, edges] == ids[:, edges - 1]).sum()
    print(f"x {shape}, {x.nbytes / 1e6:.1f} MB; {documents} documents")
    print(f"cross {crossed} of {edges.size * ROWS} edges between blocks")

    blocks = P(None, "seq")
    on_mesh = [
        jax.device_put(operand, NamedSharding(mesh, spec))
        for operand, spec in ((params, P()), (x, blocks), (ids, blocks))
    ]

    def on_blocks(f):
        local, specs = partial(f, axis_name="seq"), ((P(), P()), blocks, blocks)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=blocks)

    programs = {
        "1 device": (two_scans, (params, x, ids)),
        f"{ARGS.devices} devices, automatic": (two_scans, on_mesh),
        f"{ARGS.devices} devices, axis_name": (on_blocks(two_scans), on_mesh),
        "the same, bidirectional": (on_blocks(reversing), on_mesh),
    }
    want, first, rows = one_by_one(params, x, ids), None, []
    for name, (f, operands) in programs.items():
        print(f"compiling and running: {name}", flush=True)
        (gradients, y), figures = measure(f, *operands)
        first = first or gradients
        pairs = zip(*map(jax.tree.leaves, (first, gradients)), strict=True)
        # Sums in another order differ by rounding; relative to the largest value.
        pairs = [tuple(map(np.asarray, pair)) for pair in [(want, y), *pairs]]
        errors = [np.abs(a - b).max() / np.abs(a).max() for a, b in pairs]
        rows.append((name, *figures, max(errors)))

    print(f"\n{'program':24} {'MB a device':>11} {'ms':>7} {'error':>8}  sent")
    for name, held, ms, sent, error in rows:
        print(f"{name:24} {held:11.1f} {ms:7.1f} {error:8.1e}  {sent}")
    if max(row[-1] for row in rows) > 1e-4:
        raise SystemExit("The results differ by more than rounding.")


if __name__ == "__main__":
    main()

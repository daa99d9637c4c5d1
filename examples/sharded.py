"""A bidirectional state space layer over a sequence that is sharded over devices.

Each device holds a block of the segment axis. The layer is a diagonal linear
recurrence, h[t] = decay * h[t - 1] + x[t]: a scan within the block, and one state a
row handed on from block to block. The backward direction is the same function on the
reversed sequence, which `axis_name` reverses without any device ever holding it all.

The devices are simulated on the CPU, so that it runs anywhere.
"""

import argparse
import os
import re
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


ROWS, FEATURES = 4, 64
ARGS = arguments()
# The number of devices must be set before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={ARGS.devices}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

from jax_revseg import bidirectional  # noqa: E402


def recurrence(decay, x):
    """h[t] = decay * h[t - 1] + x[t] along axis 1, all steps at once."""

    def combine(left, right):
        (a, h), (b, g) = left, right
        return a * b, b * h + g

    return lax.associative_scan(combine, (jnp.broadcast_to(decay, x.shape), x), axis=1)


def layer_on_blocks(decay, x):
    """The same where x is one block of axis 1; what moves is a state a row."""
    powers, h = recurrence(decay, x)
    before = jnp.arange(lax.axis_size("seq")) < lax.axis_index("seq")
    ends = lax.all_gather(h[:, -1], "seq")  # (devices, rows, features)
    # The state that enters this block: the ends of all blocks before it, decayed.
    distance = lax.axis_index("seq") - 1 - jnp.arange(len(ends))
    weight = before[:, None] * powers[0, -1] ** jnp.maximum(distance, 0)[:, None]
    enters = jnp.einsum("dnf,df->nf", ends, weight)
    return h + powers * enters[:, None]


def run(layer, params, x, lengths, axis_name=None):
    forward, backward = (partial(layer, jax.nn.sigmoid(a)) for a in params)
    return bidirectional(forward, backward)(x, lengths, axis_name=axis_name)


def with_gradient(f):
    """The gradient of the mean square by the decays and x, and the layer's output."""

    def loss(params, x, lengths):
        y = f(params, x, lengths)
        return jnp.mean(y**2), y

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


def measure(f, *operands):
    """The result, the bytes that each device holds, the collectives, and the time."""
    compiled = jax.jit(with_gradient(f)).lower(*operands).compile()
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    kinds = re.findall(r" (all-[a-z-]+|collective-permute)\(", str(compiled.as_text()))
    sent = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    result = jax.block_until_ready(compiled(*operands))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*operands))
    seconds = time.perf_counter() - start
    return result, (held + memory.temp_size_in_bytes, seconds, sent or "none")


def main():
    mesh = jax.make_mesh((ARGS.devices,), ("seq",), axis_types=(AxisType.Auto,))
    rng, shape = np.random.default_rng(0), (ROWS, ARGS.length, FEATURES)
    x = rng.normal(size=shape).astype(np.float32)
    lengths = rng.integers(ARGS.length // 2, ARGS.length + 1, ROWS)
    params = tuple(rng.uniform(1, 4, (2, FEATURES)).astype(np.float32))

    blocks, whole = P(None, "seq"), P()
    sharded = jax.shard_map(
        partial(run, layer_on_blocks, axis_name="seq"),
        mesh=mesh,
        in_specs=((whole, whole), blocks, whole),
        out_specs=blocks,
    )
    on_mesh = [
        jax.device_put(operand, NamedSharding(mesh, spec))
        for operand, spec in ((params, whole), (x, blocks), (lengths, whole))
    ]
    on_one = partial(run, lambda *args: recurrence(*args)[1])
    programs = {
        "1 device": (on_one, (params, x, lengths)),
        f"{ARGS.devices} devices, no axis_name": (on_one, on_mesh),
        f"{ARGS.devices} devices, axis_name": (sharded, on_mesh),
    }
    results, rows = [], []
    for name, (f, operands) in programs.items():
        print(f"compiling and running: {name}", flush=True)
        result, figures = measure(f, *operands)
        results.append(result)
        # Sums in another order differ by rounding; relative to the largest value.
        pairs = zip(*map(jax.tree.leaves, (results[0], result)), strict=True)
        error = max(
            np.max(np.abs(a - np.asarray(b))) / np.max(np.abs(a)) for a, b in pairs
        )
        rows.append((name, *figures, error))

    (_, of_x), y = results[-1]
    print(f"\nx {shape}, {x.nbytes / 1e6:.1f} MB; with axis_name each device holds")
    print(f"{'device':>8} {'steps':>15} {'x (MB)':>8} {'output':>8} {'gradient':>8}")
    arrays = (on_mesh[1], y, of_x)
    for shards in zip(*(a.addressable_shards for a in arrays), strict=True):
        steps = shards[0].index[1]
        sizes = " ".join(f"{shard.data.nbytes / 1e6:8.2f}" for shard in shards)
        print(f"{shards[0].device.id:8} {steps.start:7}-{steps.stop:<7} {sizes}")

    print(f"\n{'program':24} {'MB a device':>11} {'ms':>7} {'error':>8}  sent")
    for name, held, seconds, sent, error in rows:
        print(f"{name:24} {held / 1e6:11.1f} {seconds * 1e3:7.1f} {error:8.1e}  {sent}")
    if max(row[-1] for row in rows) > 1e-4:
        raise SystemExit("The results differ by more than rounding.")


if __name__ == "__main__":
    main()

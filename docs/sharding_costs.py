"""Prints the table of docs/sharding.md: what each sharding makes the devices send.

`python -m docs.sharding_costs` compiles for 8 simulated CPU devices and reads the
collectives, and the bytes that one device holds, out of what the compiler says.
"""

import os
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402

from jax_revseg import (  # noqa: E402
    associative_scan_segments,
    reverse_segments,
    reverse_sequence,
)
from tests.meshes import bytes_received  # noqa: E402

SHAPE = (8, 4096, 64)
# The share of a collective's result that one of 8 devices gets from the others. A ring
# of 8 sends a sum twice round, and the 8 parts of a scattered sum once.
SHARE = {"all-to-all": 7 / 8, "all-gather": 7 / 8, "all-reduce": 2 * 7 / 8}
SHARE["reduce-scatter"] = 7


def reverse(layout, x, segments, **keywords):
    if layout == "ids":
        return reverse_segments(x, segment_ids=segments, **keywords)
    reverse = reverse_sequence if layout == "padded" else reverse_segments
    return reverse(x, segments, **keywords)


def scan(layout, x, segments, **keywords):
    """A linear recurrence whose decay depends on the step: a pair for each element."""

    def combine(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    name = {"padded": "lengths", "packed": "cu_seqlens", "ids": "segment_ids"}[layout]
    elems = jax.nn.sigmoid(x), x
    return associative_scan_segments(combine, elems, **{name: segments}, **keywords)[1]


def costs(compiled):
    """Collectives, bytes that a device receives, bytes that it holds."""
    found = bytes_received(compiled)
    names = [name for name, _ in found]
    received = sum(SHARE.get(name, 1) * size for name, size in found)
    memory = compiled.memory_analysis()
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    sent = ", ".join(f"{names.count(n)} {n}" for n in sorted(set(names)))
    return sent or "none", received, held + memory.argument_size_in_bytes


def row(title, layout, spec, axis_type, axis_name=None, f=reverse):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(axis_type,))
    batch = spec[0] if len(spec) else None
    rows = {
        "padded": P(batch),
        "packed": P(batch, None),
        "ids": P(batch, "devices" if axis_name else None),
    }[layout]
    shape = SHAPE[:1] + {"padded": (), "packed": (16,), "ids": SHAPE[1:2]}[layout]
    x, segments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in ((SHAPE, "float32", spec), (shape, "int32", rows))
    )
    f = partial(f, layout)
    if axis_name:
        local = partial(f, axis_name=axis_name)
        f = jax.shard_map(local, mesh=mesh, in_specs=(spec, rows), out_specs=spec)

    def pullback(ct, segments):  # Any value of x will do, but no constant.
        return jax.vjp(lambda x: f(x, segments), ct)[1](ct)[0]

    block = 4 * np.prod(SHAPE) / 8
    cells = []
    for g in f, pullback:
        sent, received, held = costs(jax.jit(g).lower(x, segments).compile())
        cells += [sent, f"{received / block:.2f}", f"{held / block:.1f}"]
    print(f"| {title} | {' | '.join(cells)} |", flush=True)


def main():
    print(f"jax {jax.__version__}, x float32 {SHAPE}, 8 simulated CPU devices\n")
    head = ["collectives", "received", "held"]
    print(f"| sharded | {' | '.join(head)} | {' | '.join(head)} |")
    print("|---" * 7 + "|")
    batch, segment, feature = P("devices"), P(None, "devices"), P(None, None, "devices")
    for kind in (AxisType.Auto, AxisType.Explicit):
        name = kind.name.lower()
        row(f"batch, {name}", "padded", batch, kind)
        row(f"feature, {name}", "padded", feature, kind)
    for layout in "padded", "packed", "ids":
        row(f"segment, auto, {layout}", layout, segment, AxisType.Auto)
    for layout in "padded", "packed", "ids":
        title = f"segment, `axis_name`, {layout}"
        row(title, layout, segment, AxisType.Auto, "devices")
    for title, spec in (("batch", batch), ("segment", segment)):
        row(f"scan, {title}, auto, ids", "ids", spec, AxisType.Auto, f=scan)
    for layout in "padded", "packed", "ids":
        title = f"scan, segment, `axis_name`, {layout}"
        row(title, layout, segment, AxisType.Auto, "devices", scan)


if __name__ == "__main__":
    main()

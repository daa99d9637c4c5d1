"""What XLA's compiler for TPUs makes of the reversals: `python -m benchmarks.tpu_aot`.

Programs are compiled for chips that are not there, and run nowhere. The compiler is
libtpu (the extra `tpu`). Writes results/compiled/tpu_aot.json and the table of
docs/tpu.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib import metadata
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.results import FOLDER, source
from tests.cases import BENCHMARKS, Case

RESULTS = FOLDER / "compiled" / "tpu_aot.json"
PAGE = FOLDER.parent.parent / "docs" / "tpu.md"
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
# An instruction in a serialized program: its opcode, and the tag of its shape. Some
# programs for v6e cannot be had as text.
COLLECTIVES = rb"\x12.(all-|collective-|reduce-scatter|ragged-all)[a-z-]*\x1a"
NAMES = (
    *("padded-64x128x256", "padded-64x1024x1024", "time-major-128x64x256"),
    *("bfloat16-64x128x256", "int8-64x128x256"),
    *("packed-16x2048x256-k16", "ids-16x2048x256-k16", "packed-1x65536x64-k512"),
    *("padded-64x512x8", "padded-512x2048x1"),
)
CASES = [
    *(case for case in BENCHMARKS if case.name in NAMES),
    Case("padded-64x1001x1024", (64, 1001, 1024)),  # 8 does not divide 1001.
]


@lru_cache
def devices(generation: str) -> Any:
    """Four chips or more that are not there."""
    # Compiling touches no chip, so several processes may compile at once, and no
    # metadata service needs to say which chips this machine has.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    name = GENERATIONS[generation]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def lower_for(
    generation: str,
    case: Case,
    implementation: str = "xla",
    direction: str = "forward",
    sharded: bool = False,
) -> jax.stages.Lowered:
    """For one chip, or for several with x sharded by rows (else by features)."""
    chips, segments = devices(generation), case.segments()

    def forward(x: jax.Array, segments: jax.Array) -> jax.Array:
        return case.call(x, segments, implementation=implementation)

    def vjp(ct: jax.Array, segments: jax.Array) -> jax.Array:
        # The backward pass alone needs no more of x than its type.
        x = jnp.zeros_like(ct)
        return jax.vjp(lambda x: forward(x, segments), x)[1](ct)[0]

    function = forward if direction == "forward" else vjp
    shardings: list[Any] = [SingleDeviceSharding(chips[0])] * 2
    if sharded:
        mesh = Mesh(np.array(chips), ("chips",))
        by_rows = case.batch_shape[0] % len(chips) == 0
        split: list[str | None] = [None] * len(case.shape)
        split[case.batch_axes[0] if by_rows else -1] = "chips"
        specs = PartitionSpec(*split), PartitionSpec("chips" if by_rows else None)
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        if implementation == "pallas":  # XLA cannot split a kernel.
            function = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=specs[0]
            )
    operands = [
        jax.ShapeDtypeStruct(case.shape, case.dtype, sharding=shardings[0]),
        jax.ShapeDtypeStruct(segments.shape, segments.dtype, sharding=shardings[1]),
    ]
    return jax.jit(function).lower(*operands)


def collectives(compiled: jax.stages.Compiled) -> int:
    """How often the program exchanges data between chips."""
    executable: Any = compiled.runtime_executable()
    return len(re.findall(COLLECTIVES, executable.serialize(), re.DOTALL))


def measure(lowered: jax.stages.Lowered, case: Case) -> dict[str, Any]:
    """What the compiler says of its program."""
    compiled = lowered.compile()
    ideal = 2 * math.prod(case.shape) * np.dtype(case.dtype).itemsize
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {
        "bytes_to_ideal": round(costs["bytes accessed"] / ideal, 3),
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": lowered.as_text().count("tpu_custom_call"),
    }


def rows() -> Iterator[dict[str, Any]]:
    for case, implementation in product(CASES, ("xla", "pallas")):
        inexact = jnp.issubdtype(case.dtype, jnp.inexact)
        row: dict[str, Any] = {"case": case.name, "by": implementation}
        ways = product(GENERATIONS, ("forward", "vjp") if inexact else ("forward",))
        try:
            for generation, direction in ways:
                how = generation, case, implementation, direction
                found = row[f"{generation} {direction}"] = measure(
                    lower_for(*how), case
                )
                split = lower_for(*how, sharded=True).compile()
                found["collectives_sharded"] = collectives(split)
            yield row
        except ValueError as error:  # The kernel does not cover the case.
            print(case.name, error)


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown; forward and VJP in one cell where they agree."""
    head = f"| case | by | {' | '.join(GENERATIONS)} | temporary MB | collectives |"
    lines = [head, "|---|---|" + "---|" * (len(GENERATIONS) + 2)]
    for row in data["rows"]:
        cells = [cell for cell in row.values() if isinstance(cell, dict)]
        texts = [row["case"], row["by"]]
        for generation in GENERATIONS:
            both = [cell for key, cell in row.items() if key.startswith(generation)]
            ratios = (f"{cell['bytes_to_ideal']:.2f}" for cell in both)
            texts.append(" / ".join(dict.fromkeys(ratios)))
        texts.append(f"{max(cell['temporary_bytes'] for cell in cells) / 1e6:.1f}")
        texts.append(f"{max(cell['collectives_sharded'] for cell in cells)}")
        lines.append(f"| {' | '.join(texts)} |")
    versions = ", ".join(f"{name} {v}" for name, v in data["versions"].items())
    return "\n".join([*lines, "", f"Compiled, not run, with {versions}."])


def render(page: str, data: dict[str, Any]) -> str:
    made = f"<!-- table -->\n\n{table(data)}\n\n<!-- end -->"
    return re.sub("<!-- table -->.*?<!-- end -->", lambda _: made, page, flags=re.S)


def main() -> None:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    data = {"versions": versions, "source": source(), "rows": []}
    for row in rows():
        data["rows"].append(row)
        print(row["case"], row["by"], row["v5e forward"], flush=True)
    RESULTS.write_text(json.dumps(data).replace('{"case"', '\n{"case"') + "\n")
    PAGE.write_text(render(PAGE.read_text(), data))


if __name__ == "__main__":
    main()

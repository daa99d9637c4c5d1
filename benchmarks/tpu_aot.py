"""What XLA's compiler for TPUs makes of the reversals: `python -m benchmarks.tpu_aot`.

Compiled ahead of time for chips that need not be there, and run nowhere: needs libtpu
(the extra `tpu`), no TPU. Writes results/compiled/tpu_aot.json and the table of
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks.results import FOLDER, source
from tests.cases import BENCHMARKS, Case

RESULTS = FOLDER / "compiled" / "tpu_aot.json"
PAGE = FOLDER.parent.parent / "docs" / "tpu.md"
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
# An instruction in a serialized program: its opcode, and the tag of its shape. As text,
# some programs for v6e cannot be had.
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


def directions(case: Case) -> tuple[str, ...]:
    inexact = jax.numpy.issubdtype(case.dtype, jax.numpy.inexact)
    return ("forward", "vjp") if inexact else ("forward",)


@lru_cache
def devices(generation: str) -> Any:
    """Four chips or more that are not there."""
    # Compiling touches no chip, so several processes may do it at once, and no service
    # need be asked which chips this machine has.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(
        platform="tpu", topology_name=GENERATIONS[generation]
    ).devices


def lower_for(
    generation: str,
    case: Case,
    implementation: str = "xla",
    direction: str = "forward",
    sharded: bool = False,
) -> jax.stages.Lowered:
    """For one chip, or for several that have rows (else features) of x each."""
    chips, segments = devices(generation), case.segments()

    def forward(x: jax.Array, segments: jax.Array) -> jax.Array:
        return case.call(x, segments, implementation=implementation)

    def vjp(ct: jax.Array, segments: jax.Array) -> jax.Array:
        # The backward pass alone, which needs no more of x than its type.
        x = jax.numpy.zeros_like(ct)
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
        row: dict[str, Any] = {"case": case.name, "implementation": implementation}
        for generation, direction in product(GENERATIONS, directions(case)):
            how = generation, case, implementation, direction
            split = lower_for(*how, sharded=True).compile()
            row[f"{generation} {direction}"] = {
                **measure(lower_for(*how), case),
                "collectives_sharded": collectives(split),
            }
        yield row


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown; forward and VJP in one cell where they agree."""
    head = f"| case | by | {' | '.join(GENERATIONS)} | temporary MB | collectives |"
    lines = [head, "|---|---|" + "---|" * (len(GENERATIONS) + 2)]
    for row in data["rows"]:
        cells = [v for v in row.values() if isinstance(v, dict)]
        ratios = []
        for generation in GENERATIONS:
            both = [cell for key, cell in row.items() if key.startswith(generation)]
            texts = [f"{cell['bytes_to_ideal']:.2f}" for cell in both]
            ratios.append(" / ".join(dict.fromkeys(texts)))
        by = row["implementation"]
        if by == "pallas" and not cells[0]["kernels"]:
            by = "pallas: not covered"
        temporary = max(cell["temporary_bytes"] for cell in cells) / 1e6
        exchanged = max(cell["collectives_sharded"] for cell in cells)
        lines.append(
            f"| {row['case']} | {by} | {' | '.join(ratios)} | {temporary:.1f} | "
            f"{exchanged} |"
        )
    versions = ", ".join(f"{name} {v}" for name, v in data["versions"].items())
    return "\n".join([*lines, "", f"Compiled, not run, with {versions}."])


def render(page: str, data: dict[str, Any]) -> str:
    made = f"<!-- table -->\n\n{table(data)}\n\n<!-- end -->"
    return re.sub(
        "<!-- table -->.*?<!-- end -->", lambda _: made, page, flags=re.DOTALL
    )


def main() -> None:
    names = ("jax", "jaxlib", "libtpu")
    data = {
        "what": "compiled ahead of time, not run",
        "versions": {name: metadata.version(name) for name in names},
        "source": source(),
        "rows": [],
    }
    for row in rows():
        data["rows"].append(row)
        print(row["case"], row["implementation"], row["v5e forward"], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(), data))
    print(table(data))


if __name__ == "__main__":
    main()

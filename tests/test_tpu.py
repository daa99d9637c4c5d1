"""What the compiler for TPUs makes of the gather.

Programs are compiled ahead of time, for chips that this machine need not have.
"""

import importlib.util
import math
import os
import re
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from tests.cases import BENCHMARKS, pullback

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed",
)
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v6e": "v6e:2x2"}
COMPILED = (
    *("padded-64x128x256", "time-major-128x64x256", "bfloat16-64x128x256"),
    *("packed-16x2048x256-k16", "ids-16x2048x256-k16"),
)
each_generation = pytest.mark.parametrize("generation", GENERATIONS)
each_case = pytest.mark.parametrize(
    "case",
    [case for case in BENCHMARKS if case.name in COMPILED],
    ids=lambda case: case.name,
)


@lru_cache
def chips(generation: str) -> Any:
    """Four chips or more that are not there."""
    # Compiling touches no chip, so several processes may compile at once, and no
    # metadata service needs to say which chips this machine has.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    name = GENERATIONS[generation]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def collectives(lowered: jax.stages.Lowered) -> int:
    """How often the program exchanges data between chips."""
    # An instruction of a serialized program has its opcode before the tag of its shape.
    # Some programs for v6e cannot be had as text.
    names = rb"\x12.(all-|collective-|reduce-scatter|ragged-all)[a-z-]*\x1a"
    executable: Any = lowered.compile().runtime_executable()
    return len(re.findall(names, executable.serialize(), re.DOTALL))


@needs_compiler
@each_case
@each_generation
def test_compiles(generation, case):
    """Fails if the compiler refuses a program, counts 8 times the least for it, or
    writes more than a few indices to memory."""
    one = SingleDeviceSharding(chips(generation)[0])
    compiled = jax.jit(case.call).lower(*case.types(one, one)).compile()
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    ideal = 2 * math.prod(case.shape) * np.dtype(case.dtype).itemsize
    index_bytes = 4 * math.prod(case.batch_shape) * case.size
    assert memory.temp_size_in_bytes <= 8 * index_bytes
    assert costs["bytes accessed"] < 8 * ideal


@needs_compiler
@each_case
@each_generation
def test_sharded_gradients_exchange_nothing(generation, case):
    """Fails if the gradient of sharded rows has a collective."""
    mesh = Mesh(np.array(chips(generation)), ("chips",))
    split = [None] * len(case.shape)
    split[case.batch_axes[0]] = "chips"
    shardings = [NamedSharding(mesh, spec) for spec in (P(*split), P("chips"))]
    lowered = jax.jit(pullback(case.call)).lower(*case.types(*shardings))
    assert collectives(lowered) == 0


@needs_compiler
@each_generation
def test_collectives_are_seen(generation):
    """Fails if a program that exchanges data is taken for one that does not."""
    mesh = Mesh(np.array(chips(generation)), ("chips",))
    sharding = NamedSharding(mesh, P("chips"))
    x = jax.ShapeDtypeStruct((64, 128), "float32", sharding=sharding)
    assert collectives(jax.jit(lambda x: x - x.sum(0)).lower(x)) > 0

"""GPUs: what XLA's compiler makes of the reversals for an H200 that need not be here.

Compiled ahead of time with JAX's CUDA plugin; on a GPU, values are compared as well.
"""

import importlib.util
import math
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tests.cases import BENCHMARKS, CASES, WIDE, Case, assert_same_bits, pullback

# What jax, the driver and `nvidia-smi` say of an H200.
TARGET = Path(__file__).parent / "fixtures" / "h200.txtpb"
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
needs_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="JAX's CUDA plugin, which compiles for GPUs, is not installed",
)
by_name = partial(pytest.mark.parametrize, ids=lambda case: case.name)
PADDED = [case for case in BENCHMARKS if case.layout == "padded"]
OTHERS = [case for case in BENCHMARKS if case.layout != "padded"]


@cache
def gpu() -> SingleDeviceSharding:
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=TARGET.read_text(),
    )
    return SingleDeviceSharding(topology.devices[0])


def compiled(function: Any, case: Case) -> jax.stages.Compiled:
    return jax.jit(function).lower(*case.types(gpu(), gpu())).compile()


def text(program: jax.stages.Compiled) -> str:
    return program.as_text() or ""


def kernels(program: jax.stages.Compiled) -> list[str]:
    """The operations of a program that are not mere names for memory."""
    entry = text(program).split("\nENTRY")[1]
    found = re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([a-z][a-z-]*)\(", entry, re.MULTILINE)
    names = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return [operation for operation in found if operation not in names]


def temporary_bytes(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


@needs_compiler
@by_name("case", PADDED)
def test_padded_is_one_kernel(case):
    """Fails if something beside x is written to memory, forward or backward."""
    inexact = jnp.issubdtype(case.dtype, jnp.inexact)
    for function in (case.call, pullback(case.call)) if inexact else (case.call,):
        program = compiled(function, case)
        assert kernels(program) == ["fusion"]
        assert temporary_bytes(program) == 0


@needs_compiler
@by_name("case", OTHERS)
def test_others_are_few_kernels(case):
    """Fails if finding the segments takes a loop, or memory, or many kernels."""
    index_bytes = 4 * math.prod(case.batch_shape) * case.size
    for function in (case.call, pullback(case.call)):
        program = compiled(function, case)
        assert 1 <= len(kernels(program)) <= 8
        assert not re.search(r"\bwhile\(", text(program))
        assert temporary_bytes(program) <= 2 * index_bytes


@needs_compiler
def test_neighbours_fuse():
    """Fails if elementwise work before or after costs a pass over memory."""
    case = PADDED[0]
    program = compiled(lambda x, s: jnp.tanh(case.call(2 * x, s)) + 1, case)
    assert kernels(program) == ["fusion"]
    assert temporary_bytes(program) == 0


@needs_compiler
def test_kernels_are_seen():
    """Fails if a program with temporaries and a loop is taken for one without."""

    def costly(x, segments):
        shifted = jax.lax.fori_loop(0, segments[0], lambda _, x: jnp.roll(x, 1, 1), x)
        return jnp.cumsum(shifted, 1) / shifted.sum()

    program = compiled(costly, PADDED[0])
    assert len(kernels(program)) > 1
    assert re.search(r"\bwhile\(", text(program))
    assert temporary_bytes(program) > 0


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
def test_on_a_gpu():
    """Fails if what the GPU computes differs from the reference."""
    for case in CASES:
        if not {case.dtype, case.lengths_dtype} & {*WIDE}:  # They need x64.
            x, s = case.x(), case.segments()
            assert_same_bits(jax.jit(case.call)(x, s), case.expected(x, s), case.name)

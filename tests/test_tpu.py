"""TPUs: the kernel that one may ask for, and what the compiler makes of the gather.

The kernel's values are checked in Pallas's interpreters, and on a TPU where there is
one. Programs are compiled ahead of time, for chips that are not there.
"""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from jax_revseg import (
    _kernel_tpu,
    _primitive,
    reverse_segment_order,
    reverse_segments_p,
    reverse_sequence,
)
from jax_revseg._layout import Layout
from tests.cases import (
    AXES,
    BENCHMARKS,
    KINDS,
    LENGTHS_TYPES,
    Case,
    assert_same_bits,
)

by_name = partial(pytest.mark.parametrize, ids=lambda case: case.name)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed",
)

# The table of cases with rows of 128 values, which are what the kernel takes.
WIDE_KINDS = tuple(
    dataclasses.replace(case, shape=(*case.shape[:-1], 128)) for case in KINDS
)
WIDE_AXES = tuple(
    dataclasses.replace(case, shape=(*case.shape, 128))
    for case in AXES
    if 0 not in case.shape
)
WIDE_LENGTHS = tuple(
    dataclasses.replace(case, shape=(*case.shape, 128))
    for case in LENGTHS_TYPES
    if case.lengths_dtype in ("int8", "uint8", "uint32")
)

# Where the axis before the last is the segment axis, a batch axis, or a feature axis;
# sizes that tiles and blocks do not divide, and more steps than a block holds.
PLACES = (
    ((3, 43, 200), 1, (0,)),
    ((2, 1100, 128), 1, (0,)),
    ((40, 128), 0, ()),
    ((21, 9, 130), 0, (1,)),
    ((600, 3, 128), 0, (1,)),
    ((3, 7, 5, 128), 1, (0,)),
    ((2, 1, 2, 7, 11, 128), 3, (4, 1, 0)),
)
LAYOUTS = ("padded", "packed", "ids")
# Integers of 8 and 16 bits stand for all such dtypes: they have no NaN that the
# interpreter, which runs on a CPU, could make quiet.
SIZES = tuple(
    Case(
        f"{layout}-{dtype}-{'x'.join(map(str, shape))}",
        shape,
        dtype,
        layout,
        axis,
        batch_axes,
        padding_id=0 if layout == "ids" else None,
    )
    for i, (shape, axis, batch_axes) in enumerate(PLACES)
    for j, dtype in enumerate(("float32", "uint16", "int8"))
    for k, layout in enumerate(LAYOUTS)
    if (i + j + k) % 3 == 0
)


@pytest.fixture
def kernels(monkeypatch):
    """Has the CPU lower as a TPU does, to the interpreted kernel; lists its shapes."""
    used = []
    reverse = _kernel_tpu.reverse

    def interpreted(x, segments, **params):
        used.append(x.shape)
        return reverse(x, segments, interpret=True, **params)

    monkeypatch.setattr(_kernel_tpu, "reverse", interpreted)
    register = partial(
        _primitive.mlir.register_lowering, reverse_segments_p, platform="cpu"
    )
    register(_primitive._reverse_segments_tpu_lowering)
    yield used
    register(partial(_primitive._reverse_segments_lowering, windows=True))


@pytest.mark.kernel
@pytest.mark.parametrize("group", (WIDE_KINDS, WIDE_AXES, WIDE_LENGTHS))
def test_kernel_on_the_table(kernels, group):
    """Fails on a value in the wrong place, for a kind of lengths, an order of axes, a
    dtype."""
    xs, segments = [case.x() for case in group], [case.segments() for case in group]
    outs = jax.jit(
        lambda xs, segments: [
            case.call(x, s, implementation="pallas")
            for case, x, s in zip(group, xs, segments, strict=True)
        ]
    )(xs, segments)
    assert set(kernels) == {case.shape for case in group}
    for case, x, s, out in zip(group, xs, segments, outs, strict=True):
        assert_same_bits(out, case.expected(x, s), case.name)


# The interpreter that keeps account of memory takes long for many steps.
WATCHED = [c for c in SIZES if c.dtype == "float32" and c.size != 600]


@pytest.mark.kernel
@by_name("case", [c for c in SIZES if c not in WATCHED])
def test_kernel_at_the_edges_of_blocks(kernels, case):
    """Fails if a block reads or writes past its end, or values that share a word get
    mixed."""
    x, segments = case.x(), case.segments()
    out = jax.jit(partial(case.call, implementation="pallas"))(x, segments)
    assert kernels
    assert_same_bits(out, case.expected(x, segments))


@pytest.mark.kernel
@by_name("case", WATCHED)
def test_kernel_reads_only_what_it_has(case):
    """Fails if reads past a buffer, or of memory that nobody wrote, reach the
    result."""
    x, segments = case.x(), case.segments()
    layout = Layout(case.layout, case.axis, case.batch_axes, case.padding_id)
    out = _kernel_tpu.reverse(
        x,
        segments,
        plan=_kernel_tpu.plan(x, layout),
        layout=layout,
        # Out-of-bounds reads raise here, and memory starts as NaN.
        interpret=pltpu.InterpretParams(),
    )
    assert_same_bits(out, case.expected(x, segments))


@pytest.mark.kernel
def test_kernel_under_transformations(kernels):
    """Fails if a rule forgets `implementation`, or the kernel cannot take the axes it
    makes."""
    rng = np.random.default_rng(0)
    x, ct = rng.integers(-9, 9, (2, 3, 4, 20, 128)).astype(np.float32)
    lengths = np.array([[0, 20, 7, 13], [1, 2, 19, 20], [5, 5, 6, 20]])

    def reverse(x, lengths):
        return reverse_sequence(x, lengths, implementation="pallas")

    def loss(x, ct, lengths):
        return (ct * jax.vmap(reverse)(x, lengths)).sum()

    expected = np.stack(
        [reverse_sequence(row, n) for row, n in zip(x, lengths, strict=True)]
    )
    back = np.stack(
        [reverse_sequence(row, n) for row, n in zip(ct, lengths, strict=True)]
    )
    for in_axes, out_axes in (((0, 0), 0), ((1, 1), 2), ((2, 0), 1)):
        moved = (np.moveaxis(x, 0, in_axes[0]), np.moveaxis(lengths, 0, in_axes[1]))
        kernels.clear()
        out = jax.jit(jax.vmap(reverse, in_axes, out_axes))(*moved)
        assert len(kernels) == 1
        np.testing.assert_array_equal(out, np.moveaxis(expected, 0, out_axes))
    kernels.clear()
    value, gradient = jax.jit(jax.value_and_grad(loss))(x, ct, lengths)
    assert len(kernels) >= 1
    assert value == (ct * expected).sum()
    np.testing.assert_array_equal(gradient, back)
    text = str(jax.make_jaxpr(jax.grad(loss))(x, ct, lengths))
    assert text.count("implementation=pallas") == text.count("reverse_segments[") >= 1
    order = partial(reverse_segment_order, implementation="pallas")
    assert str(jax.make_jaxpr(order)(x[:, 0], lengths)).count("=pallas") == 2


@pytest.mark.kernel
def test_kernel_under_shard_map(kernels):
    """Fails if devices do not run the kernel on their own blocks."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    x = np.arange(4 * 16 * 128, dtype=np.float32).reshape(4, 16, 128)
    lengths = np.array([0, 16, 3, 9])
    reverse = partial(reverse_sequence, implementation="pallas")
    out = jax.jit(
        jax.shard_map(
            reverse,
            mesh=mesh,
            in_specs=P("rows"),
            out_specs=P("rows"),
            check_vma=False,  # Pallas's interpreter cannot; the compiler can, below.
        )
    )(x, lengths)
    assert kernels == [(2, 16, 128)]
    np.testing.assert_array_equal(out, reverse_sequence(x, lengths))


X = np.arange(4 * 7 * 128).reshape(4, 7, 128)
LENGTHS = np.array([0, 5, 3, 7])
LAST = "a last axis of 128 or more features"
REFUSALS = {
    "narrow": (X[..., :127], {}, LAST),
    "rows last": (np.moveaxis(X, 0, 2), dict(axis=0, batch_axis=2), LAST),
    "steps last": (np.moveaxis(X, 1, 2), dict(axis=2), LAST),
    "empty": (X[:0], {}, "static sizes above 0"),
    "float16": (X.astype(np.float16), {}, "float16, and .* one of the dtypes float32"),
    "bool": (X > 9, {}, "bool, and the kernel needs one of the dtypes"),
    "complex": (X.astype(np.complex64), {}, "complex64, and .* one of the dtypes"),
    "long": (np.zeros((4, 14336, 128), np.float32), {}, "in 14 MiB of VMEM"),
}


@pytest.mark.parametrize("x, axes, why", REFUSALS.values(), ids=REFUSALS)
def test_kernel_that_cannot_run_raises_and_says_why(x, axes, why):
    call = partial(reverse_sequence, **axes, implementation="pallas")
    lengths = LENGTHS[: len(x)] if x.shape[0] == 0 else LENGTHS
    traced = jax.jit(call).trace(x, lengths)
    with pytest.raises(ValueError, match=f"implementation is 'pallas', but .*{why}"):
        traced.lower(lowering_platforms=("tpu",))


def test_kernel_of_a_partitioned_program_raises_and_says_why():
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    x = jax.device_put(X, jax.NamedSharding(mesh, P("rows")))
    traced = jax.jit(partial(reverse_sequence, implementation="pallas")).trace(
        x, LENGTHS
    )
    with pytest.raises(ValueError, match="partitioned over .* inside jax.shard_map"):
        traced.lower(lowering_platforms=("tpu",))


def test_kernel_on_another_platform_raises_without_importing_pallas():
    code = """
import sys, jax, jax.numpy as jnp
from jax_revseg import reverse_sequence
x, lengths = jnp.ones((2, 8, 128)), jnp.array([3, 8])
try:
    reverse_sequence(x, lengths, implementation="pallas")
except ValueError as error:
    assert "compiled for cpu; leave implementation out" in str(error), error
else:
    raise AssertionError("no error")
assert (reverse_sequence(x, lengths, implementation="xla") == x).all()
assert "jax_revseg._kernel_tpu" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_implementation():
    """Fails if a misspelt name is taken for the default."""
    wrong: Any = "palas"
    call = partial(reverse_sequence, implementation=wrong)
    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=r"implementation is 'palas'.*'pallas'"):
            run(np.ones((2, 3)), np.array([1, 2]))


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="there is no TPU here")
def test_on_a_tpu():
    """Fails if the kernel, compiled and run, differs from the reference."""
    for case in (*SIZES, *WIDE_KINDS, *WIDE_AXES):
        x, segments = case.x(), case.segments()
        out = jax.jit(partial(case.call, implementation="pallas"))(x, segments)
        assert_same_bits(out, case.expected(x, segments), case.name)


GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
COMPILED = (
    *("padded-64x128x256", "time-major-128x64x256", "bfloat16-64x128x256"),
    *("packed-16x2048x256-k16", "ids-16x2048x256-k16"),
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


def lower(case, implementation, shardings, wrap=lambda function: function, vjp=False):
    def forward(x, segments):
        return case.call(x, segments, implementation=implementation)

    def gradient(ct, segments):
        # The backward pass alone needs no more of x than its type.
        x = jnp.zeros_like(ct)
        return jax.vjp(lambda x: forward(x, segments), x)[1](ct)[0]

    segments = case.segments()
    operands = [
        jax.ShapeDtypeStruct(case.shape, case.dtype, sharding=shardings[0]),
        jax.ShapeDtypeStruct(segments.shape, segments.dtype, sharding=shardings[1]),
    ]
    return jax.jit(wrap(gradient if vjp else forward)).lower(*operands)


def collectives(lowered: jax.stages.Lowered) -> int:
    """How often the program exchanges data between chips."""
    # An instruction of a serialized program has its opcode before the tag of its shape.
    # Some programs for v6e cannot be had as text.
    names = rb"\x12.(all-|collective-|reduce-scatter|ragged-all)[a-z-]*\x1a"
    executable: Any = lowered.compile().runtime_executable()
    return len(re.findall(names, executable.serialize(), re.DOTALL))


@needs_compiler
@by_name("case", [case for case in BENCHMARKS if case.name in COMPILED])
@pytest.mark.parametrize("implementation", ("xla", "pallas"))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation, implementation, case):
    """Fails if the compiler refuses a program, or gives it more bytes and temporaries
    than docs/tpu.md says."""
    kernels = int(implementation == "pallas")
    lowered = lower(
        case, implementation, 2 * [SingleDeviceSharding(chips(generation)[0])]
    )
    assert lowered.as_text().count("tpu_custom_call") == kernels
    compiled = lowered.compile()
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    ideal = 2 * math.prod(case.shape) * np.dtype(case.dtype).itemsize
    if kernels and case.layout == "padded":
        assert costs["bytes accessed"] < 1.02 * ideal  # It also reads the lengths.
        assert memory.temp_size_in_bytes == 0
    index_bytes = 4 * math.prod(case.batch_shape) * case.size
    assert memory.temp_size_in_bytes <= 8 * index_bytes
    assert costs["bytes accessed"] < 8 * ideal


@needs_compiler
@by_name("case", [case for case in BENCHMARKS if case.name in COMPILED])
@pytest.mark.parametrize("implementation", ("xla", "pallas"))
@pytest.mark.parametrize("generation", GENERATIONS)
def test_sharded_gradients_exchange_nothing(generation, implementation, case):
    """Fails if the gradient of sharded rows has a collective."""
    mesh = Mesh(np.array(chips(generation)), ("chips",))
    split = [None] * len(case.shape)
    split[case.batch_axes[0]] = "chips"
    specs = P(*split), P("chips")

    def wrap(function):
        # XLA cannot split a kernel.
        if implementation == "pallas":
            shard_map = partial(jax.shard_map, mesh=mesh)
            return shard_map(function, in_specs=specs, out_specs=specs[0])
        return function

    shardings = [NamedSharding(mesh, spec) for spec in specs]
    lowered = lower(case, implementation, shardings, wrap, vjp=True)
    assert lowered.as_text().count("tpu_custom_call") == (implementation == "pallas")
    assert collectives(lowered) == 0


@needs_compiler
@pytest.mark.parametrize("generation", GENERATIONS)
def test_collectives_are_seen(generation):
    """Fails if a program that exchanges data is taken for one that does not."""
    mesh = Mesh(np.array(chips(generation)), ("chips",))
    x = jax.ShapeDtypeStruct(
        (64, 128), "float32", sharding=NamedSharding(mesh, P("chips"))
    )
    assert collectives(jax.jit(lambda x: x - x.sum(0)).lower(x)) > 0

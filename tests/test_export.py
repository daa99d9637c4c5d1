"""jax.export: one artifact for every platform and every size, now and years on.

`python -m tests.test_export` writes the fixture, which must come from the oldest
supported JAX: run it there, and only when that version moves.
"""

import contextlib
import pathlib
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_revseg
from jax_revseg import reverse_segment_order, unpack_segments
from tests.cases import SMALL, assert_same_bits
from tests.meshes import with_gradients

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "exported-by-jax-0.7.2.bin"
# What StableHLO cannot say by itself: jax.export's check of the sizes that it is called
# with, and the running sum of packed lengths where their number is not known.
SHAPES = {"shape_assertion"}
SUMS = {"shape_assertion", "stablehlo.dynamic_reduce_window"}
SEGMENTS = {  # Their shape; and repeats, so that 7 steps are 280: several words.
    "padded": ("b", SHAPES, (1, 0)),
    "packed": ("b, k", SUMS, (1, 0)),
    "ids": ("b, t", SHAPES, (40, 1)),
    "offsets": ("b, k + 1", SUMS, (1, 0)),
    "starts": ("b, t", SHAPES, (40, 1)),
}


def exported(f, *shapes, dtype=jnp.int32):
    """Exports `f` for symbolic shapes: of a float array, and of `dtype` after it."""
    scope = export.SymbolicScope()
    shapes = [export.symbolic_shape(shape, scope=scope) for shape in shapes]
    specs = [
        jax.ShapeDtypeStruct(shape, dtype if i else jnp.float32)
        for i, shape in enumerate(shapes)
    ]
    return export.export(jax.jit(f), platforms=PLATFORMS)(*specs)


def custom_calls(artifact):
    return set(re.findall(r"custom_call @([\w.]+)", artifact.mlir_module()))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.layout)
def test_every_size_symbolic(case):
    """Fails on a size baked in, a call that another platform lacks, no gradient."""
    segments, calls, repeats = SEGMENTS[case.layout]
    x, s = case.x(), case.segments()
    artifact = exported(case.call, "b, t, d", segments, dtype=s.dtype)
    assert artifact.platforms == PLATFORMS
    assert custom_calls(artifact) == custom_calls(artifact.vjp()) == calls
    twice = case.layout in ("padded", "packed")  # The others have the same rules.
    loaded = export.deserialize(artifact.serialize(vjp_order=1 + twice))

    both = jax.jit(partial(with_gradients, loaded.call))
    small = x, s
    large = x[:2].repeat(40, 1).repeat(3, 2), s[:2].repeat(*repeats)
    for x, s in (small, large):
        y, x_bar = both(x, s, x)
        assert_same_bits(y, case.expected(x, s))
        assert_same_bits(x_bar, y)

    if twice:
        x = np.arange(x.size, dtype=np.float32).reshape(x.shape) / 8
        energy = jax.grad(lambda x: (loaded.call(x, s) ** 3).sum())
        directional = jax.jit(jax.grad(lambda x: energy(x).sum()))
        np.testing.assert_allclose(directional(x), 6 * x, rtol=1e-6)


@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.layout)
def test_known_sizes_need_no_custom_call(case):
    """Fails on a kernel or a library call where plain StableHLO would do."""
    x, s = case.x(), case.segments()
    artifact = export.export(jax.jit(case.call), platforms=PLATFORMS)(x, s)
    assert custom_calls(artifact) == custom_calls(artifact.vjp()) == set()


@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.layout)
def test_padding_value(case):
    """Fails if the mask is wrong for a symbolic size or for lengths out of range."""
    segments, calls, _ = SEGMENTS[case.layout]
    artifact = exported(partial(case.call, padding_value=5.0), "b, t, d", segments)
    assert custom_calls(artifact) == calls
    x, s = case.x(), case.segments()
    if case.layout != "ids":
        s = s * 3 - 2
    assert_same_bits(artifact.call(x, s), case.expected(x, s, 5.0))


def test_other_functions():
    """Fails if the order of segments, or packing, needs a known size."""
    x, lengths = SMALL[1].x(), SMALL[1].segments()
    order = exported(reverse_segment_order, "b, t, d", "b, k").call(x, lengths)
    for actual, want in zip(order, reverse_segment_order(x, lengths), strict=True):
        assert_same_bits(actual, want)

    x = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    n = np.array([2, 0, 4], np.int32)
    unpack = partial(unpack_segments, total_length=7)
    desired = unpack(x, n)
    host = exported(lambda x: unpack(x, n), "3, l, 2")
    assert_same_bits(host.call(x), desired)

    def back(x, n):  # Both sizes are symbolic.
        flat = unpack_segments(x, n, total_length=x.shape[0] * x.shape[1])
        rows = jax_revseg.pack_segments(flat, n, max_length=x.shape[1])
        return unpack(x, n), rows

    flat, rows = exported(back, "n, l, 2", "n").call(x, n)
    assert_same_bits(flat, desired)
    valid = np.arange(4)[:, None] < n[:, None, None]
    assert_same_bits(rows, np.where(valid, x, 0))


@pytest.mark.parametrize("n", (3, 9, 2**31, 2**40))
def test_host_lengths_past_a_symbolic_axis(n):
    def both(x):
        segments = jax_revseg.reverse_segments(x, [1, n - 2])
        return jax_revseg.reverse_sequence(x, n), segments

    x = np.arange(4, dtype=np.float32)
    want = ([2, 1, 0, 3], [0, 1, 2, 3]) if n == 3 else ([3, 2, 1, 0], [0, 3, 2, 1])
    np.testing.assert_array_equal(exported(both, "t").call(x), want)


FIXTURE_SHAPES = ("b, 7, d", "b", "b, 3", "b, 7")


def every_layout(x, padded, packed, ids):
    segments = (padded, packed, ids)
    return tuple(case.call(x, s) for case, s in zip(SMALL, segments, strict=False))


@contextlib.contextmanager
def expired_artifacts():
    """Consents to load artifacts older than the six months that JAX promises."""
    flag = "jax_export_deserialize_expired_versions"
    if not hasattr(jax.config, flag):  # Only JAX 0.12 and newer ask.
        yield
        return
    jax.config.update(flag, True)
    try:
        with pytest.warns(DeprecationWarning, match="6-month"):
            yield
    finally:
        jax.config.update(flag, False)


def test_artifact_of_the_oldest_jax():
    """Fails on an artifact that somebody stored, and this JAX cannot run."""
    # Integers: the gradients of all three results are added.
    x = np.arange(112, dtype=np.float32).reshape(4, 7, 4)
    segments = [case.segments() for case in SMALL[:3]]
    with expired_artifacts():  # The gradient is loaded when it is asked for.
        loaded = export.deserialize(bytearray(FIXTURE.read_bytes()))
        ys, vjp = jax.vjp(lambda x: loaded.call(x, *segments), x)
        zeros = [np.zeros_like(x) for _ in ys]
        x_bars = [vjp((*zeros[:i], x, *zeros[i + 1 :]))[0] for i in range(len(ys))]
    assert loaded.platforms == PLATFORMS
    for case, s, y, x_bar in zip(SMALL, segments, ys, x_bars, strict=False):
        assert_same_bits(y, case.expected(x, s), case.name)
        assert_same_bits(x_bar, y, case.name)


if __name__ == "__main__":
    if jax.__version__ not in FIXTURE.name:
        sys.exit(f"{FIXTURE.name} must not come from JAX {jax.__version__}.")
    # Keep the paths of this machine out of it.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    artifact = exported(every_layout, *FIXTURE_SHAPES)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_bytes(artifact.serialize(vjp_order=1))

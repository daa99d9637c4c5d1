"""One table of cases for tests and benchmarks: operands, the call, what is right.

A case is plain data. It makes its operands (NumPy, seeded by its name), knows the
public call and the same call on the NumPy reference:

    x, segments = case.x(), case.segments()
    assert_same_bits(case.call(x, jnp.asarray(segments)), case.expected(x, segments))
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import _reference, reverse_segments, reverse_sequence


@dataclass(frozen=True)
class Case:
    """One reversal: shapes, axes and dtypes, and the kind of lengths."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "padded"  # or "packed", "ids", "starts", "offsets" (cu_seqlens)
    axis: int = 1
    batch_axes: tuple[int, ...] = (0,)
    lengths: str = "random"  # or "zero", "one", "full", "over" (out of range)
    count: int = 3  # Segments a row, in every layout but "padded".
    lengths_dtype: str = "int32"
    padding_id: int | None = None

    @property
    def size(self) -> int:
        """The size of the segment axis, T."""
        return self.shape[self.axis]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.batch_axes)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def x(self) -> np.ndarray:
        """Random bits, which are every kind of float, with the rare kinds planted."""
        return random_bits(self._rng(), self.shape, self.dtype)

    def segments(self) -> np.ndarray:
        """What goes beside x: booleans as starts, all else in `lengths_dtype`."""
        rng, dtype = self._rng(), jnp.dtype(self.lengths_dtype)
        if self.layout == "padded":
            return self._lengths(rng, self.batch_shape, self.size).astype(dtype)
        lengths = self._lengths(
            rng, (*self.batch_shape, self.count), self.size // self.count
        )
        if self.layout == "packed":
            return lengths.astype(dtype)
        offsets = np.concatenate([lengths[..., :1] * 0, lengths.cumsum(-1)], -1)
        if self.layout == "offsets":
            return offsets.astype(dtype)
        # The number of offsets at or before a position is the number of its segment,
        # from 1 on; what follows the last segment is the run of id 0.
        marks = np.zeros((*self.batch_shape, self.size + 1), int)
        *rows, _ = np.indices(offsets.shape)
        if self.layout == "starts":  # The first one is not marked: it is one anyway.
            np.add.at(marks, (*rows, offsets), np.arange(self.count + 1) > 0)
            return marks[..., :-1] > 0
        np.add.at(marks, (*rows, offsets), 1)
        ids, t = marks.cumsum(-1)[..., :-1], np.arange(self.size)
        return np.where(t < offsets[..., -1:], ids, 0).astype(dtype)

    def _lengths(self, rng, shape: tuple[int, ...], limit: int) -> np.ndarray:
        """Lengths of the kind asked for, up to `limit` (but for "over")."""
        if self.lengths == "random":
            return rng.integers(0, limit + 1, shape)
        if self.lengths == "over":
            info = jnp.iinfo(self.lengths_dtype)
            extremes = [info.min, info.max // 2, limit, info.max - limit]
            if self.layout in ("ids", "offsets"):  # Their sums must not wrap here.
                extremes = [-2, limit, 2 * limit + 3, -limit]
            fits = [v for v in extremes if info.min <= v <= info.max]
            return rng.choice(np.array(fits, object), shape)  # 2**64 - 1 among them.
        value = {"zero": 0, "one": min(1, limit), "full": limit}[self.lengths]
        return np.full(shape, value)

    def types(self, *shardings: Any) -> list[jax.ShapeDtypeStruct]:
        """Both operands' types, for programs that are compiled and not run."""
        segments = self.segments()
        types = (self.shape, self.dtype), (segments.shape, segments.dtype)
        pairs = zip(types, shardings, strict=True)
        return [jax.ShapeDtypeStruct(*t, sharding=s) for t, s in pairs]

    def call(self, x: Any, segments: Any, **more: Any) -> jax.Array:
        """The public function on these operands."""
        axes: dict[str, Any] = dict(axis=self.axis, batch_axis=self.batch_axes, **more)
        if self.layout in ("ids", "starts"):  # They lie like x.
            order = np.argsort((*self.batch_axes, self.axis))
            numpy = jnp if isinstance(segments, jax.Array) else np
            segments = numpy.transpose(segments, order)
        if self.layout == "padded":
            return reverse_sequence(x, segments, **axes)
        if self.layout == "ids":
            axes["padding_id"] = self.padding_id
        names = {"packed": "lengths", "ids": "segment_ids", "offsets": "cu_seqlens"}
        axes[names.get(self.layout, self.layout)] = segments
        return reverse_segments(x, **axes)

    def expected(
        self, x: np.ndarray, segments: np.ndarray, padding_value: Any = None
    ) -> np.ndarray:
        """The reference on these operands; out-of-range lengths are cut."""
        layout = self.layout
        if layout == "offsets":
            layout, segments = "packed", np.diff(segments.astype(object))
        elif layout == "starts":
            layout, segments = "ids", 1 + segments.cumsum(-1)
        axes = dict(axis=self.axis, batch_axes=self.batch_axes)
        more = dict(padding_id=self.padding_id, padding_value=padding_value)
        return _reference.reverse(x, segments, layout=layout, **axes, **more)


def random_bits(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Values of any dtype by their bits, with special floats where there is room."""
    kind = jnp.dtype(dtype)
    if kind == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    x = np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), np.uint8)
    x = x & np.uint8((1 << min(bit_width(kind), 8)) - 1)  # int4 lies in a byte.
    x = x.view(kind).copy()
    if jnp.issubdtype(kind, jnp.inexact) and bit_width(kind) >= 16:
        part = x.view(x.real.dtype)  # Complex numbers are pairs of floats.
        unsigned = f"uint{8 * part.itemsize}"
        special = np.array([-0.0, np.inf, -np.inf, np.nan], part.dtype).view(unsigned)
        payload = special[1] | np.array([1, 42], unsigned)  # Signalling, at that.
        denormal = np.array([1, 3], unsigned)
        special = np.concatenate([special, -special[:1], payload, denormal])
        at = rng.permutation(part.size)[: special.size]
        part.view(unsigned)[at] = special[: at.size]
    return x.reshape(shape)


def bit_width(dtype: Any) -> int:
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return 8
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 8 * dtype.itemsize
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def bits(x: Any) -> np.ndarray:
    """The bits of an array: bytes, so that NaN payloads and -0.0 count."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.ascontiguousarray(x)
    raw = x.reshape(*np.shape(x), 1).view(np.uint8)
    return raw & np.uint8((1 << min(bit_width(x.dtype), 8)) - 1)


def assert_same_bits(actual: Any, expected: Any, message: str = "") -> None:
    """Same shape, same dtype, same bits."""
    assert actual.shape == expected.shape, (message, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (message, actual.dtype, expected.dtype)
    np.testing.assert_array_equal(bits(actual), bits(expected), message)


def pullback(f: Any) -> Any:
    """The backward pass of `f(x, segments)`, for `x` as the cotangent."""
    return lambda x, s: jax.vjp(lambda x: f(x, s), x)[1](x)[0]


def enable_x64() -> Any:
    """A context in which 64-bit types are on."""
    if hasattr(jax, "enable_x64"):  # From JAX 0.8 on this is the only way.
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


LAYOUTS = ("padded", "packed", "ids", "offsets", "starts")
# All but int1, uint1 and 6-bit floats, which the newest JAX names and cannot run.
DTYPES = (
    *("bool", "int4", "int8", "int16", "int32", "int64"),
    *("uint4", "uint8", "uint16", "uint32", "uint64"),
    *("float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "bfloat16", "float16", "float32", "float64"),
    *("complex64", "complex128"),
)
WIDE = ("int64", "uint64", "float64", "complex128")  # Only with `enable_x64`.

# Every layout with every kind of lengths.
KINDS = tuple(
    Case(f"{layout}-{kind}", (4, 7, 2), layout=layout, lengths=kind, padding_id=0)
    for layout in LAYOUTS
    for kind in ("random", "zero", "one", "full", "over")
    if kind != "over" or layout not in ("ids", "starts")  # None is out of range.
)

# Every rank, with the segment axis and the batch axes anywhere and in any order.
_AXES: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...] = (
    ((7,), 0, ()),
    ((7, 3), 0, (1,)),
    ((3, 7), 1, ()),
    ((2, 3, 7), 2, (1, 0)),
    ((7, 2, 3), 0, (2,)),
    ((2, 7, 3, 2), 1, (3, 0)),
    ((2, 1, 2, 1, 2, 7, 2), 5, (6, 4, 2, 0)),
    ((1, 2, 1, 2, 6, 1, 2, 3), 4, (7, 0, 3)),
    ((0, 7, 2), 1, (0,)),  # Nothing in an axis: of the batch,
    ((3, 0, 2), 1, (0,)),  # of the segments,
    ((3, 7, 0), 1, (0,)),  # of the features.
)
AXES = tuple(
    Case(
        f"{layout}-{'x'.join(map(str, shape))}-axis{axis}",
        shape,
        layout=layout,
        axis=axis,
        batch_axes=batch_axes,
        padding_id=0 if layout == "ids" else None,
    )
    for i, (shape, axis, batch_axes) in enumerate(_AXES)
    for layout in ("padded", LAYOUTS[1 + i % 4])
)

# Every dtype of x; the layouts take turns, since they and the dtypes never meet.
TYPES = tuple(
    Case(f"{LAYOUTS[i % 3]}-{dtype}", (4, 7, 2), dtype, LAYOUTS[i % 3])
    for i, dtype in enumerate(DTYPES)
)

# Every dtype of lengths, with values at its own limits: 127 is less than T = 300, and
# 2**63 is more than an int32 or an int64 can hold. Four bits hold few ids.
LENGTHS_TYPES = (
    *(
        Case(f"{k}-by-{d}", (6, 300), layout=k, lengths="over", lengths_dtype=d)
        for k in ("padded", "packed")
        for d in DTYPES
        if jnp.issubdtype(d, jnp.integer)
    ),
    Case("ids-by-uint4", (6, 9), layout="ids", lengths_dtype="uint4"),
    Case("offsets-by-int4", (6, 7), layout="offsets", lengths_dtype="int4"),
)

CASES = (*KINDS, *AXES, *TYPES, *LENGTHS_TYPES)
SMALL = tuple(case for case in KINDS if case.lengths == "random")  # One of each layout.

# What the benchmarks time. The tests run the first of each layout.
_TIME_MAJOR = dict(axis=0, batch_axes=(1,))
BENCHMARKS = (
    Case("padded-64x128x256", (64, 128, 256)),
    Case("padded-32x512x512", (32, 512, 512)),
    Case("padded-64x512x8", (64, 512, 8)),
    Case("padded-512x2048x1", (512, 2048, 1)),
    Case("padded-64x1024x1024", (64, 1024, 1024)),
    Case("time-major-128x64x256", (128, 64, 256), **_TIME_MAJOR),
    Case("time-major-512x64x8", (512, 64, 8), **_TIME_MAJOR),
    Case("time-major-2048x512x1", (2048, 512, 1), **_TIME_MAJOR),
    Case("bfloat16-64x128x256", (64, 128, 256), "bfloat16"),
    Case("int8-64x128x256", (64, 128, 256), "int8"),
    Case("bool-64x128x256", (64, 128, 256), "bool"),
    Case("bfloat16-512x2048x1", (512, 2048, 1), "bfloat16"),
    Case("int8-512x2048x1", (512, 2048, 1), "int8"),
    Case("packed-16x2048x256-k16", (16, 2048, 256), layout="packed", count=16),
    Case("packed-1x65536x64-k512", (1, 65536, 64), layout="packed", count=512),
    Case("packed-16x8192x1-k64", (16, 8192, 1), layout="packed", count=64),
    Case("ids-16x2048x256-k16", (16, 2048, 256), layout="ids", count=16),
    Case("ids-1x65536x64-k512", (1, 65536, 64), layout="ids", count=512),
    Case("ids-16x8192x1-k64", (16, 8192, 1), layout="ids", count=64),
)


def reverse_order(x, lengths, *, axis, batch_axes):
    """Lays the segments of each row down in the opposite order, each one intact."""
    out, out_lengths = x.copy(), np.zeros_like(lengths)
    rows, out_rows = (_reference.rows_of(a, axis, batch_axes) for a in (x, out))
    for row in np.ndindex(*lengths.shape[:-1]):
        bounds = _reference.packed_bounds(lengths[row], x.shape[axis])[::-1]
        pieces = [rows[row][start:end] for start, end in bounds]
        out_rows[row][: bounds[0][1]] = np.concatenate(pieces)
        out_lengths[row] = [len(piece) for piece in pieces]
    return out, out_lengths

"""Every case of the table against the NumPy reference, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_revseg
from jax_revseg import _reference, reverse_segments, reverse_sequence
from jax_revseg._layout import Layout
from tests import cases
from tests.cases import AXES, KINDS, LENGTHS_TYPES, TYPES, assert_same_bits, enable_x64


# The cases of KINDS are test_eager's, those of TYPES are in test_arrays.py as well.
@pytest.mark.parametrize("group", (AXES, LENGTHS_TYPES))
def test_jitted(group):
    """Fails if jit moves a value to the wrong place, or changes its bits."""
    xs, segments = [case.x() for case in group], [case.segments() for case in group]

    @jax.jit  # One program for all, since compiling is what takes the time.
    def run(xs, segments):
        triples = zip(group, xs, segments, strict=True)
        return [case.call(x, s) for case, x, s in triples]

    with enable_x64():
        outs = run(xs, segments)
    for case, x, s, out in zip(group, xs, segments, outs, strict=True):
        assert_same_bits(out, case.expected(x, s), case.name)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_eager(case):
    """Fails if a value moves to the wrong place, from the host or on a device."""
    x, segments = case.x(), case.segments()
    given = [jnp.asarray(segments)]
    if case.lengths != "over":  # The same values from the host.
        given += [segments, segments.tolist()]
    for s in given:
        assert_same_bits(case.call(x, s), case.expected(x, segments))
        out = case.call(x, s, padding_value=-2)
        assert_same_bits(out, case.expected(x, segments, -2))


def test_padding_value():
    """Fails if padding is not overwritten, or anything else changes."""
    rows = [case for case in AXES if len(case.batch_axes) == 2]
    group = [*rows, *TYPES]
    with enable_x64():
        xs, segments = [case.x() for case in group], [case.segments() for case in group]
        for x in xs:
            # XLA computes `where` on small floats in wider ones, which quiets NaNs.
            if x.dtype.kind == "V" or x.itemsize <= 2:
                with np.errstate(invalid="ignore"):
                    x[x != x] = 1
        ones = [np.ones((), x.dtype)[()] for x in xs]  # 1 fits every dtype.
        known, traced = ones[: len(rows)], ones[len(rows) :]

        @jax.jit
        def run(xs, segments, traced):
            triples = zip(group, xs, segments, strict=True)
            values = zip(triples, (*known, *traced), strict=True)
            return [c.call(x, s, padding_value=v) for (c, x, s), v in values]

        outs = run(xs, segments, traced)
    for case, x, s, one, out in zip(group, xs, segments, ones, outs, strict=True):
        assert_same_bits(out, case.expected(x, s, padding_value=one), case.name)


def test_padding_value_at_the_limits():
    """Fails if the least or the greatest value of a dtype is refused."""
    limits = {d: (np.iinfo(d).min, np.iinfo(d).max) for d in ("int8", "uint32")}
    limits["float32"] = (np.finfo("float32").min, np.finfo("float32").max, np.inf)
    limits["bool"] = (0, 1)  # Integers, one of which packing has by default.
    for dtype, values in limits.items():
        x = np.array([1, 0, 1, 1, 0], dtype)
        for value in values:
            given = float(value) if dtype == "float32" else int(value)
            out = reverse_sequence(x, 2, padding_value=given)
            assert_same_bits(out, np.array([0, 1, *[value] * 3], dtype))


def test_keys():
    """Fails if the hidden axis of a key array is taken for one of its axes."""
    keys, lengths = jax.random.split(jax.random.key(0), (3, 5)), np.array([0, 3, 5])
    data = np.asarray(jax.random.key_data(keys))
    kept = np.stack([data[0], [*data[1, 2::-1], *data[1, 3:]], data[2, ::-1]])
    filled = kept.copy()
    filled[0] = filled[1, 3:] = data[2, 2]
    for value, want in ((None, kept), (keys[2, 2], filled)):
        out = reverse_sequence(keys, lengths, padding_value=value)
        assert out.dtype == keys.dtype
        np.testing.assert_array_equal(jax.random.key_data(out), want)


def test_wrapped_arrays():
    """Fails if an object with `__jax_array__`, such as a Flax parameter, is refused."""

    class Wrapped:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    x = np.arange(6, dtype=np.int32)
    out = reverse_sequence(Wrapped(jnp.asarray(x)), Wrapped(jnp.asarray(4)))
    assert_same_bits(out, x[[3, 2, 1, 0, 4, 5]])


def test_default_axes():
    """Fails if the axes that are left out are not the documented ones."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, (3, 4, 5), np.int32)
    row, plane = [1, 4, 3], rng.integers(0, 6, (3, 4)).tolist()
    turned, rows = np.transpose(plane), [[1, 2], [2, 2], [0, 3]]
    ids, column = [4, 4, 9, 9], [3, 1, 0, 2]
    sequences = (  # Lengths and keywords, then the axis and the batch axes.
        (2, {}, 0),
        (row, {}, 1, 0),
        (row, dict(axis=-1), 2, 0),
        (plane, {}, 2, 0, 1),
        (column, dict(axis=0), 0, 1),
        (turned, dict(axis=2, batch_axis=[1, -3]), 2, 1, 0),
    )
    segments = (  # What the reference gets comes before the axes.
        (dict(lengths=[1, 2]), "packed", [1, 2], 0),
        (dict(lengths=rows), "packed", rows, 1, 0),
        (dict(cu_seqlens=[0, 2, 4], axis=1), "packed", [2, 2], 1),
        (dict(segment_ids=ids, axis=1), "ids", ids, 1),
        (dict(segment_ids=plane), "ids", plane, 1, 0),
    )

    @jax.jit
    def run(x):
        outs = [reverse_sequence(x, n, **keywords) for n, keywords, *_ in sequences]
        return outs + [reverse_segments(x, **keywords) for keywords, *_ in segments]

    wanted = [("padded", n, *axes) for n, _, *axes in sequences]
    wanted += [case[1:] for case in segments]
    for out, (layout, values, axis, *rest) in zip(run(x), wanted, strict=True):
        axes, values = dict(axis=axis, batch_axes=tuple(rest)), np.array(values)
        assert_same_bits(out, _reference.reverse(x, values, layout=layout, **axes))


def test_host_lengths_of_any_dtype():
    """Fails if host lengths are compared or added up in their own narrow dtype."""
    x = np.arange(200, dtype=np.int32)
    short = [7, 0, 5], np.r_[x[6::-1], x[11:6:-1], x[12:]]
    full = [100, 100], np.r_[x[99::-1], x[:99:-1]]  # The sum passes an int8.
    assert_same_bits(reverse_segments(x, cu_seqlens=[0, 7, 7, 12]), short[1])
    for dtype, (values, expected) in (
        ("uint4", short),
        ("uint64", short),
        ("int8", full),
    ):
        lengths = np.array(values, dtype)
        for given in (lengths, jnp.asarray(lengths)):
            assert_same_bits(reverse_segments(x, given), expected)


def test_ids_from_the_host_past_32_bits():
    """Fails if ids that differ only in bits that a device drops become one segment."""
    x = np.arange(5, dtype=np.int32)
    ids = np.array([1, 1, 1 + 2**32, 1 + 2**32, -(2**40)])
    assert_same_bits(reverse_segments(x, segment_ids=ids), x[[1, 0, 3, 2, 4]])
    for padding_id, expected in ((1 + 2**32, [1, 0, 2, 3, 4]), (1, [0, 1, 3, 2, 4])):
        out = reverse_segments(x, segment_ids=ids, padding_id=padding_id)
        assert_same_bits(out, x[expected])


def test_padding_id_at_the_limits():
    """Fails if the least and the greatest id of a dtype are taken for ids past it."""
    x = np.arange(4, dtype=np.int32)
    for dtype in ("int8", "uint32"):
        for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
            ids = np.array([5, 5, value, value], dtype)
            for given in (ids, jnp.asarray(ids)):
                out = reverse_segments(x, segment_ids=given, padding_id=int(value))
                assert_same_bits(out, x[[1, 0, 2, 3]])


def test_sums_that_wrap():
    """Fails if a sum of lengths that wraps around 2**32 opens segments again."""
    most = np.iinfo(np.int32).max
    few = [[2, most, most, 2, 2], [-most, 6, 1, -1, most], [most] * 5]
    n = 2**16  # So many segments of so many steps are 2**32, which wraps to 0.
    many = [[3, 0, n - 9, *[n] * (n - 3)], [n] * n]
    for lengths, size in ((few, 6), (many, n)):
        lengths = np.array(lengths, np.int32)
        x = np.arange(len(lengths) * size, dtype=np.int32).reshape(-1, size)
        want = _reference.reverse(x, lengths, axis=1, batch_axes=(0,), layout="packed")
        assert_same_bits(reverse_segments(x, jnp.array(lengths)), want)


def test_no_segments():
    """Fails if K = 0 needs a last segment."""
    x, empty = np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros((2, 0), np.int32)
    for given in (empty, jnp.asarray(empty), [[], []]):
        assert_same_bits(reverse_segments(x, given), x)
    assert_same_bits(reverse_segments(x[0], cu_seqlens=[0]), x[0])
    out, lengths = jax_revseg.reverse_segment_order(x, empty)
    assert_same_bits(out, x)
    assert lengths.shape == (2, 0)
    assert_same_bits(reverse_segments(x, empty, padding_value=7), np.full_like(x, 7))


def test_axis_longer_than_an_int32():
    """Fails if positions past 2**31 wrap in the dtype of the index."""
    for size, kind, positions in (
        (2**31 - 1, "padded", "i32"),  # No window, which would need more positions.
        (2**31, "padded", "ui32"),
        (2**31 + 8, "padded", "ui32"),
        (2**31 + 8, "packed", "ui32"),
    ):
        x = jax.ShapeDtypeStruct((size,), jnp.int8)
        shape = () if kind == "padded" else (4,)
        lengths = jax.ShapeDtypeStruct(shape, jnp.int32)
        layout = Layout(kind, 0, ())
        bind = functools.partial(jax_revseg.reverse_segments_p.bind, layout=layout)
        text = jax.jit(bind).lower(x, lengths).as_text()
        assert f"tensor<{size}x{positions}>" in text


def test_table():
    """Fails if two cases share a name, hence their data, or a dtype is left out."""
    names = [case.name for case in (*cases.CASES, *cases.BENCHMARKS)]
    assert len(set(names)) == len(names)
    assert {case.dtype for case in cases.CASES} == set(cases.DTYPES)


def test_segment_order():
    """Fails on a wrong order, changed content, or other lengths than those."""
    rng, axes = np.random.default_rng(0), dict(axis=2, batch_axes=(1, 0))
    x = rng.standard_normal((3, 2, 9, 2)).astype(np.float32)
    reverse = jax.jit(
        functools.partial(jax_revseg.reverse_segment_order, axis=2, batch_axis=(1, 0))
    )
    for low, high in ((0, 4), (-3, 9), (0, 1)):
        lengths = rng.integers(low, high, (2, 3, 4)).astype(np.int32)
        wanted = cases.reverse_order(x, lengths, **axes)
        for out, want in zip(reverse(x, lengths), wanted, strict=True):
            assert_same_bits(out, want)
    out, out_lengths = jax_revseg.reverse_segment_order(np.arange(6), [2, 3])
    np.testing.assert_array_equal(out, [2, 3, 4, 0, 1, 5])
    np.testing.assert_array_equal(out_lengths, [3, 2])

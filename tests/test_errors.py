"""Bad input raises what is documented: argument, values, and what to do instead.

Each pattern holds the argument's name and both values that disagree. A test that fails
leaves a user with a wrong result, or with an error that does not help.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_revseg import (
    _reference,
    associative_scan_segments,
    bidirectional,
    bidirectional_scan,
    pack_segments,
    reverse_segment_order,
    reverse_segments,
    reverse_sequence,
    scan_segments,
    unpack_segments,
)
from tests.cases import Case, assert_same_bits, enable_x64
from tests.meshes import make_mesh

X = np.arange(12, dtype=np.float32).reshape(3, 4)
I8 = np.zeros((2, 4), np.int8)
seq, seg, order = reverse_sequence, reverse_segments, reverse_segment_order
pack, unpack = pack_segments, unpack_segments

# One line each: what is called, and what it says.
TYPE_ERRORS = (
    # What x may be.
    (
        lambda: seq([1, 2], 1),
        r"^reverse_sequence: x must be .* \[1, 2\] of type list.*asarray",
    ),
    (lambda: seq({"a": X}, 1), r"x must be an array.* of type dict.*tree\.map"),
    (lambda: seq(None, 1), r"x must be an array, but is None of type NoneType"),
    (
        lambda: seg(3.0, [1]),
        "^reverse_segments: x must be an array, but is 3.0 of type",
    ),
    (
        lambda: order("abc", [1]),
        "^reverse_segment_order: x must be .* 'abc' of type str",
    ),
    (lambda: seq(np.array(["a"]), 1), r"x must be an array, but is <U1\[1\]"),
    (
        lambda: seq(np.ma.masked_equal([1, 2], 2), 1),
        r"x must be .*MaskedArray; use \.filled",
    ),
    # What lengths may be, and axis_name.
    (lambda: seq(X, np.ma.masked_equal([1, 2, 3], 2)), r"lengths.*masked"),
    (lambda: seq(X, [1] * 3, axis_name=0), r"axis_name is 0"),
    (lambda: seq(X, [1] * 3, axis_name=3), r"axis_name is 3"),
    (lambda: seq(X, [1] * 3, axis_name=()), r"axis_name is \(\)"),
    (lambda: seq(X, [1] * 3, axis_name=["d"]), r"axis_name is \['d'\]"),
    (lambda: seq(X, X > 0), r"lengths is bool\[3,4\].*segment_ids=mask.ast.*starts="),
    (lambda: seq(X, [True] * 3), r"lengths is \[True, .*padding_id=0"),
    (lambda: seq(X, [1.0, 2, 3]), r"lengths is \[1.0, 2, 3\].*integers.*astype\(int"),
    (lambda: seq(X, jnp.ones(3)), r"lengths is float32\[3\].*integers"),
    (lambda: seq(X, 1j), r"lengths is 1j of type complex.*integers"),
    (lambda: seq(X, None), r"lengths is None of type NoneType.*integers"),
    (lambda: seq(X, "abc"), r"lengths is 'abc' of type str.*integers"),
    (lambda: seq(X, [1, None, 2]), r"lengths is \[1, None, 2\] of type list"),
    (lambda: seq(X, [0, 2**70, 0]), r"lengths is .*64 bits at most"),
    (lambda: seq(X, np.array([1, 2, 3], object)), r"lengths is object\[3\].*64 bits"),
    (lambda: seg(X, segment_ids=X), r"segment_ids is float32\[3,4\].*integers"),
    (lambda: seg(X, starts=X), r"starts is float32\[3,4\].*booleans.*segment_ids="),
    (lambda: seg(X, cu_seqlens=[0.0]), r"cu_seqlens is \[0.0\].*integers"),
    # What axes may be.
    (lambda: seq(X, [1] * 3, axis=1.0), r"axis is 1\.0 of type float; use an int"),
    (lambda: seq(X, [1] * 3, axis="1"), r"axis is '1' of type str; use an int"),
    (lambda: seq(X, [1] * 3, batch_axis=0.0), r"batch_axis is 0\.0 of type float"),
    (lambda: seq(X, [1] * 3, batch_axis=[None]), r"batch_axis is None of type"),
    (
        lambda: seg(X, segment_ids=[[0] * 4] * 3, padding_id=0.5),
        r"padding_id is 0\.5 of type float; use an int",
    ),
    # What fits into the dtype of x.
    (
        lambda: unpack(
            jax.random.split(jax.random.key(0), (2, 3)), [1, 2], total_length=3
        ),
        r"x has dtype key<fry>.*key_data",
    ),
    (
        lambda: unpack(X.astype(ml_dtypes.float8_e8m0fnu), [1] * 3),
        "x has dtype float8_e8m0fnu, which has no zero for the tail",
    ),
    (
        lambda: seq(jax.random.split(jax.random.key(0)), 1, padding_value=0),
        r"padding_value is 0 .*key<fry>",
    ),
    (lambda: pack(X, [1], max_length=1.5), r"max_length is 1\.5 of type"),
    (lambda: pack(X, [1.5], max_length=1), r"lengths is \[1.5\]"),
)
VALUE_ERRORS = (
    (lambda: seq(jnp.ones((5, 2)), [3, 4]), "if x is time-major, use axis=0"),
    (
        lambda: seg(jnp.ones((5, 2)), segment_ids=jnp.ones((2, 5), int)),
        r"sizes \(5, 2\).*transpose segment_ids; .* time-major, use axis=0",
    ),
    (
        lambda: bidirectional(jnp.sin, jnp.cos, jnp.ones((5, 2, 1)), [3, 4]),
        "^bidirectional: .*if x is time-major, use axis=0",
    ),
    (
        lambda: bidirectional(
            *(lambda x: {"a": x[..., None]}, lambda x: (x[..., None],)), X, [1] * 3
        ),
        "structure",
    ),
    # One segment axis for the whole batch.
    (lambda: seg(jnp.ones((3, 9)), jnp.ones(3, int)), "axis=0"),
    # Rank and shape.
    (lambda: seq(np.float32(1), 1), r"x has rank 0 .* segment axis.*x\[None\]"),
    (lambda: seq(jnp.ones(()), 1), r"x has rank 0 \(shape \(\)\)"),
    (lambda: seq(X, [1, 2]), r"lengths has shape \(2,\) .* sizes \(3,\)"),
    (lambda: seq(X, [[1, 2], [3]]), r"lengths is not an array.*inhomogeneous"),
    (lambda: seq(X, [[1] * 4] * 3), r"\(3, 4\) .*axis 2 is the segment axis; for"),
    (lambda: seq(X[0], [[1]]), r"lengths has shape \(1, 1\) and x has shape \(4,\)"),
    (lambda: seq(X, [[1] * 4] * 3, axis=0), r"lengths has shape \(3, 4\).*x.*\(3, 4\)"),
    (lambda: seg(X, 1), r"lengths has shape \(\).*reverse_sequence"),
    (lambda: seg(X, [[1], [1]]), r"lengths has shape \(2, 1\) .* sizes \(3,\)"),
    (lambda: order(X, [[1], [1]]), r"lengths has shape \(2, 1\) .* sizes \(3,\)"),
    (
        lambda: seg(X, segment_ids=[[0] * 5] * 3),
        r"\(3, 5\) .*axes \(0, 1\), .*\(3, 4\)",
    ),
    (lambda: seg(X, cu_seqlens=np.zeros((3, 0), int)), r"\(3, 0\).*K \+ 1 offsets"),
    # Axes.
    (lambda: seq(X, [1] * 3, axis=2), r"axis is 2 .* x has rank 2.*from -2 to 1"),
    (lambda: seq(X, [1] * 3, axis=-3), r"axis is -3 .* x has rank 2"),
    (lambda: seq(X, [1] * 3, batch_axis=5), r"batch_axis is \(5,\), but x has rank 2"),
    (lambda: seq(X, [1] * 3, batch_axis=(0, 0)), r"axes \(0, 0\), .*different axes"),
    (lambda: seq(X, 1, batch_axis=0), r"axes \(0,\), .*different axes in axis"),
    (lambda: seq(X, 1, batch_axis=1), r"lengths has shape \(\).*axes \(1,\), of sizes"),
    (lambda: seq(X, [1] * 3, axis=0, batch_axis=-2), r"axes \(0,\), .*different axes"),
    (lambda: seq(X[None], I8[:, :2], batch_axis=(1, 1)), r"axes \(1, 1\), .*different"),
    # One encoding.
    (lambda: seg(X), r"got none; .*one of lengths, segment_ids, cu_seqlens, starts"),
    (lambda: seg(X, [[4]] * 3, cu_seqlens=[0]), r"got both lengths and cu_seqlens; "),
    (lambda: seg(X, [[4]] * 3, padding_id=7), r"padding_id is 7.*by lengths"),
    (
        lambda: seg(X, segment_ids=jnp.zeros((3, 4), jnp.int8), padding_id=200),
        r"200, but .* int8.*-128 to 127",
    ),
    (
        lambda: seq(X, [1] * 3, padding_value=jnp.ones(2)),
        r"padding_value is float32\[2\]",
    ),
    (lambda: seq(X, [1] * 3, axis_name=("d", "d")), r"axis_name is.*each once"),
    (lambda: seq(X, [1] * 3, axis_name="i"), r"axis_name is 'i'.*shard_map"),
    # Packing.
    (lambda: pack(X, [[1]], max_length=2), r"lengths has shape \(1, 1\) .*jax\.vmap"),
    (lambda: pack(X, [1], max_length=-1), r"max_length is -1.*0 or more"),
    (lambda: pack(X, [2, 2], max_length=2), r"lengths\.sum\(-1\) is 4.*3"),
    (lambda: pack(X, [-1], max_length=2), r"lengths\[0\] is -1.*between 0 and 3"),
    (lambda: unpack(X[0], [1], total_length=1), r"lengths.*\(1,\).*x.*\(4,\)"),
    (lambda: unpack(X[0], [1] * 4, total_length=4), r"axes for rows and steps"),
    (lambda: unpack(X, [1], total_length=1), r"lengths.*\(1,\).*x.*\(3, 4\)"),
    (lambda: unpack(X, 1, total_length=1), r"lengths has shape \(\) .*each row"),
    (lambda: unpack(X, [1, 9, 1], total_length=5), r"number 6.*total_length is 5"),
    (lambda: unpack(X, [1, -1, 1], total_length=5), r"lengths\[1\] is -1.*negative"),
)

# Values on the host; x is X but for the last ones.
HOST_VALUES = (
    (lambda x: seq(x, [1, 5, 9]), r"lengths\[1\] is 5, .*4, the size of axis 1"),
    (lambda x: seq(x, (4, 4, -1)), r"lengths\[2\] is -1, .*between 0 and 4"),
    (lambda x: seq(x, np.array([0, 0, 200], np.uint8)), r"lengths\[2\] is 200"),
    (lambda x: seq(x, [2**63] * 3), r"lengths\[0\] is 9223372036854775808"),
    (lambda x: seq(x[0], 5), r"lengths is 5, but must lie between 0 and 4"),
    (lambda x: seq(x[0], np.int8(-1)), r"lengths is -1"),
    (lambda x: seq(x[:, :0], [0, 1, 0]), r"lengths\[1\] is 1, .*between 0 and 0"),
    (lambda x: seq(x, [[0] * 4, [1] * 4, [2] * 4], axis=0), r"lengths has shape"),
    (lambda x: seg(x, [[1, 1], [3, 2], [4, 0]]), r"lengths\.sum\(-1\)\[1\] is 5.*4"),
    (lambda x: seg(x, [[1, 1], [5, -1], [4, 0]]), r"\[1, 0\] is 5.*0 and 4"),
    (lambda x: seg(x[0], [2**62] * 4), r"lengths\[0\] is 4611686018427387904"),
    (lambda x: seg(x, np.full((3, 2), 100, np.int8)), r"lengths\[0, 0\] is 100.*4"),
    (lambda x: order(x, [[4], [4], [5]]), r"lengths\[2, 0\] is 5.*4"),
    (lambda x: seg(x[0], cu_seqlens=[1, 2]), r"cu_seqlens\[.*0\] is 1.*must be 0"),
    (
        lambda x: seg(x[0], cu_seqlens=[0, 3, 2]),
        r"diff\(cu_seqlens\)\[1\] is -1.*and 4",
    ),
    (lambda x: seg(x[0], cu_seqlens=[0, 3, 5]), r"diff\(cu_seqlens\).sum\(-1\) is 5"),
    (lambda x: seg(x[0], cu_seqlens=np.uint8([0, 3, 2])), r"cu_seqlens\)\[1\] is -1"),
    (lambda x: seg(x[0], cu_seqlens=np.uint64([0, 2**63])), r"cu_seqlens\)\[0\] is -"),
)


@pytest.mark.parametrize("call, pattern", TYPE_ERRORS)
def test_type_errors(call, pattern):
    with pytest.raises(TypeError, match=f"(?s){pattern}"):
        call()


@pytest.mark.parametrize("call, pattern", VALUE_ERRORS)
def test_value_errors(call, pattern):
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        call()


@pytest.mark.parametrize("call, pattern", HOST_VALUES)
def test_host_values(call, pattern):
    for transform in (lambda f: f, jax.jit, jax.vmap, jax.grad):
        x = X[None] if transform is jax.vmap else X
        run = transform(lambda x: jnp.sum(call(x)[0]))
        with pytest.raises(ValueError, match=f"(?s){pattern}"):
            run(x)


@pytest.mark.parametrize("layout", ("padded", "packed", "offsets"))
def test_device_values_are_cut(layout):
    """Fails if a length that is not known is refused, waited for, or reads past the
    axis."""
    case = Case("cut", (6, 5), layout=layout, lengths="over")
    x, segments = case.x(), case.segments()
    assert (segments < 0).any() and (segments > case.size).any()
    expected = case.expected(x, segments)
    assert_same_bits(case.call(x, jnp.asarray(segments)), expected)
    outs = jax.jit(
        lambda x, s: (case.call(x, s), jax.vmap(case.call)(x[None], s[None]))
    )
    direct, mapped = outs(x, segments)
    assert_same_bits(direct, expected)
    assert_same_bits(mapped[0], expected)


def test_uint64_lengths():
    """Fails if a length of 2**63 or more is cut to a negative one, or to its lower
    bits."""
    with enable_x64():
        x = np.arange(5)
        for length in (2**31, 2**32 + 1, 2**63, 2**64 - 1):
            lengths = jnp.asarray(np.array(length, np.uint64))
            assert_same_bits(reverse_sequence(x, lengths), x[::-1])
            lengths = jnp.asarray(np.array([2, length, 1], np.uint64))
            assert_same_bits(reverse_segments(x, lengths), x[[1, 0, 4, 3, 2]])


@pytest.mark.parametrize(
    "dtype", ("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64")
)
def test_offsets_at_the_limits(dtype):
    """Fails if a difference of offsets wraps: from -1 to 2**31 - 1 is no negative
    number."""
    limits = np.iinfo(dtype)
    some = {limits.min, limits.min + 1, -1, 0, 2, 7, limits.max - 1, limits.max}
    some = [v for v in some if limits.min <= v <= limits.max]
    offsets = np.array(list(itertools.product(some, repeat=3)), object)
    x = np.tile(np.arange(7), (len(offsets), 1))
    expected = _reference.reverse(
        x, np.diff(offsets), axis=1, batch_axes=(0,), layout="packed"
    )
    with enable_x64():
        on_device = jnp.asarray(offsets.astype(dtype))
        assert on_device.dtype == dtype
        assert_same_bits(reverse_segments(x, cu_seqlens=on_device), expected)


@pytest.mark.parametrize(
    "value, dtype",
    (
        (np.array(2**40), np.int32),
        (np.array(2**31), np.int32),
        (-1, np.uint8),
        (128, np.int8),
        (-129, np.int8),
        (2.5, np.int8),
        (jnp.int32(1), np.int8),
        (2, np.bool_),
        (1j, np.float32),
        ("0", np.float32),
        ([0.0], np.float32),
        (np.nan, np.int32),
        (np.array(1e300), np.float32),
        (1e300, np.complex64),
        (10**400, np.complex64),
        (np.nan, ml_dtypes.float4_e2m1fn),
        (np.inf, ml_dtypes.float8_e4m3fn),
        (0, ml_dtypes.float8_e8m0fnu),
        (8, ml_dtypes.int4),
        (np.ma.masked, np.float32),
    ),
    ids=str,
)
def test_padding_values_that_do_not_fit_raise(value, dtype):
    x = np.ones((2, 4)).astype(dtype)
    for call in (
        lambda: reverse_sequence(x, [1, 2], padding_value=value),
        lambda: pack(x, [1, 1], max_length=2, padding_value=value),
    ):
        what = rf"padding_value is (?!Array).*scalar.*dtype {x.dtype} can"
        with pytest.raises(TypeError, match=what):
            call()


def test_one_segment_along_an_axis_of_size_1():
    """Fails if it is taken for one length a row."""
    np.testing.assert_array_equal(reverse_segments(X[:1], [1]), X[:1])


def test_padding_values_that_fit_are_cast():
    for value, dtype in (
        (0.0, np.int32),
        (np.uint64(2**31 - 1), np.int32),
        (np.nan, np.float16),
        (True, np.float32),
        (7, ml_dtypes.int4),
        (0.1, ml_dtypes.bfloat16),
    ):
        out = reverse_sequence(np.ones(2).astype(dtype), 1, padding_value=value)
        desired = np.asarray(value).astype(dtype)
        assert out.dtype == dtype and np.asarray(out)[1].tobytes() == desired.tobytes()


ROWS = [np.array([1.0, 2]), np.array([3.0, 4, 5])]
X3, N, ZEROS, MASK = X[..., None], [1, 2, 3], np.zeros(3, np.float32), X > 2
NP, PAIRS = np.array(N), np.stack([X, X], -1)
IDS = np.array([[0, 0, 1, 1]] * 3)
DECAY = np.float32(0.5)


def scan(x, *args, f=lambda carry, x: (carry + x, carry), init=ZEROS, **kwargs):
    return scan_segments(f, init, x, *args, **kwargs)


def step(carry, x):
    return carry + x["a"] * x["b"], carry


def both(x, *args, f=lambda p, carry, x: (carry + p * x, carry), **kwargs):
    init = kwargs.pop("init", (ZEROS, ZEROS))
    return bidirectional_scan(f, (1.0, 2.0), init, x, *args, **kwargs)


def linear(x, *args, **kwargs):
    fn = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    return associative_scan_segments(fn, x, *args, **kwargs)


def two(*args, layers=(jnp.sin, jnp.cos), **kwargs):
    return bidirectional(*layers, *args, **kwargs)


def on_two_devices(ids):
    sums = partial(associative_scan_segments, jnp.add, axis_name="b")
    sums, axis = lambda x, ids, f=sums: f(x, segment_ids=ids), P(None, "b")
    specs = dict(in_specs=(axis, ids), out_specs=axis)
    return jax.shard_map(sums, mesh=make_mesh(), **specs)(X, IDS)


def packed_rows():
    return pack(np.concatenate(ROWS), [len(row) for row in ROWS])


LSTM = (ZEROS, ZEROS)
A, B = {"a": X}, np.arange(4, dtype=np.float32)
# A likely mistake, what its error says, and the call that it suggests.
REMEDIES = {
    "ragged list": (lambda: seq(ROWS, [2, 3]), r"np\.concatenate\(rows\)", packed_rows),
    "ragged list packed": (
        lambda: pack(ROWS, [2, 3]),
        r"lengths=\[len\(row\) for row in rows\]",
        packed_rows,
    ),
    "swapped": (lambda: seq(NP, X), "swap x and lengths", lambda: seq(X, N)),
    "swapped list": (lambda: seq(N, X), "swap x and lengths", lambda: seq(X, N)),
    "swapped scan": (lambda: scan(NP, X), "swap xs and lengths", lambda: scan(X, N)),
    "swapped elems": (lambda: linear(NP, X), "swap elems and lengths", None),
    "swapped init": (lambda: scan(ZEROS, N, init=X), "swap init and xs", None),
    "swapped params": (lambda: both(X, N, init=(1, 2)), "swap init and .*params", None),
    "swapped pack": (lambda: pack(NP, X.astype(int)), "swap x and le", None),
    "swapped pack of integers": (
        lambda: pack(NP, np.arange(6)),
        "swap x and lengths",
        lambda: pack(np.arange(6), NP),
    ),
    "ids as lengths": (
        lambda: scan(PAIRS, IDS, init=PAIRS[:, 0]),
        r"init has shape \(3, 2\).*\(boolean\) or segment_ids=",
        lambda: scan(PAIRS, segment_ids=IDS, init=PAIRS[:, 0]),
    ),
    "flat ids": (lambda: scan(X, IDS), "segment_ids=, for a mask mask=", None),
    "ids of the whole axis": (
        lambda: on_two_devices(P()),
        "give this device's block of segment_ids, by in_specs like those of elems",
        lambda: on_two_devices(P(None, "b")),
    ),
    "swapped integers": (lambda: seq(NP, X.astype(int)), "swap x and lengths", None),
    "leaf without a batch": (
        lambda: scan(A | {"b": B}, N, f=step),
        r"xs\['b'\] .*jax\.numpy\.broadcast_to",
        lambda: scan(A | {"b": jnp.broadcast_to(B, X.shape)}, N, f=step),
    ),
    "scalar decay": (
        lambda: linear((0.5, X), N),
        r"elems\[0\].*jax\.numpy\.full_like",
        lambda: linear((jnp.full_like(X, 0.5), X), N),
    ),
    "scalar decay in an array": (
        lambda: linear((DECAY, X), N),
        r"elems\[0\].*jax\.numpy\.full_like",
        lambda: linear((jnp.full_like(X, DECAY), X), N),
    ),
    "sum too large": (
        lambda: pack(X, [2, 2]),
        r"sum\(lengths\) <= len\(x\)",
        lambda: pack(X, [2, 1]),
    ),
    "no function": (lambda: scan(X, N, f=None), "f is None", lambda: scan(X, N)),
    "no function both ways": (lambda: both(X, N, f=None), "f is None", None),
    "no fn": (lambda: associative_scan_segments(None, X, N), "fn is None", None),
    "called layer": (
        lambda: two(X3, N, layers=(jnp.sin(X3), jnp.cos)),
        r"forward is float32\[3,4,1\], .*function of x",
        lambda: two(X3, N),
    ),
    "merge": (
        lambda: two(X3, N, merge="sum"),
        r"merge is 'sum'.*jax\.numpy\.add",
        lambda: two(X3, N, merge=jnp.add),
    ),
    "traced reverse": (
        lambda: jax.jit(lambda r: scan(X, N, reverse=r))(True),
        r"reverse is bool\[\]; use True or False",
        lambda: scan(X, N, reverse=True),
    ),
    "only a carry": (
        lambda: scan(X, N, f=lambda h, x: h + x),
        r"returned float32\[3\]; return \(h, h\)",
        lambda: scan(X, N, f=lambda h, x: 2 * (h + x,)),
    ),
    "state of an LSTM": (
        lambda: scan(X, N, init=LSTM, f=lambda c, x: (c[0] + x, c[1])),
        r"return \(\(h, c\), h\)",
        lambda: scan(X, N, init=LSTM, f=lambda c, x: ((c[0] + x, c[1]), c[0])),
    ),
    "one LSTM's init": (
        lambda: both(X, N, init=LSTM, f=lambda p, c, x: ((c[0] + x, c[1]), c[0])),
        r"\(\(h, c\), \(h, c\)\)",
        lambda: both(
            X, N, init=(LSTM, LSTM), f=lambda p, c, x: ((c[0] + x, c[1]), c[0])
        ),
    ),
    "shapes of carries": (
        lambda: scan(X, N, f=lambda h, x: (h[:, None], h)),
        r"carry of float32\[3\], .* float32\[3,1\]",
        None,
    ),
    "carry_in": (
        lambda: scan(X, starts=MASK, carry_in=np.zeros((3, 2))),
        r"carry_in is float\d+\[3,2\], but must be float32\[3\]",
        lambda: scan(X, starts=MASK, carry_in=ZEROS),
    ),
}
for f, x in ((scan, X), (both, X), (two, X3)):
    SEVERAL = dict(cu_seqlens=[[0, 2, 4]] * 3), dict(segment_ids=IDS)
    REMEDIES[f"packed lengths {f.__name__}"] = (
        lambda f=f, x=x: f(x, [[2, 2]] * 3),
        "cu_seqlens= or segment_ids=",
        lambda f=f, x=x, several=SEVERAL: [f(x, **given) for given in several],
    )
    for name in ("lengths", "segment_ids"):
        REMEDIES[f"mask as {name} {f.__name__}"] = (
            lambda f=f, x=x, name=name: f(x, **{name: MASK}),
            "mask= .*starts=",
            lambda f=f, x=x: [f(x, mask=MASK), f(x, starts=MASK)],
        )


@pytest.mark.parametrize(
    ("mistake", "pattern", "remedy"), REMEDIES.values(), ids=[*REMEDIES]
)
def test_remedies(mistake, pattern, remedy):
    """Fails on an error without our name, or advice that fails when it is followed."""
    ours = "(reverse|pack|scan|bidirectional|associative)[a-z_]*: "
    with pytest.raises((TypeError, ValueError), match=f"(?s)^{ours}.*{pattern}"):
        mistake()
    if remedy is not None:
        assert jax.tree.leaves(jax.block_until_ready(remedy()))


@pytest.mark.peers
def test_remedies_for_torch():
    """Fails if the advice for a tensor or a PackedSequence does not work."""
    torch = pytest.importorskip("torch")
    x = torch.arange(12.0).reshape(3, 4)
    half = x.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"jax\.dlpack\.from_dlpack\(x"):
        seq(half, N)
    out = seq(jax.dlpack.from_dlpack(half.detach()), N)
    assert_same_bits(out, seq(X, N).astype(jnp.bfloat16))
    rnn = torch.nn.utils.rnn
    packed = rnn.pack_padded_sequence(x, N, batch_first=True, enforce_sorted=False)
    for f in (seq, pack_segments, scan, two):
        with pytest.raises(TypeError, match=r"PackedSequence; .*pad_packed_sequence"):
            f(packed, N)
    padded, lengths = rnn.pad_packed_sequence(packed, batch_first=True)
    assert_same_bits(seq(padded, lengths), seq(padded.numpy(), lengths.numpy()))

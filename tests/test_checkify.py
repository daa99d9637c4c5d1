"""Under checkify, lengths out of range raise, with row and value; elsewhere they cost
nothing: no effect in the jaxpr, no callback in the program."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from jax_revseg import (
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
from tests.cases import assert_same_bits
from tests.meshes import mesh, put

X = np.arange(32, dtype=np.float32).reshape(4, 8)


def by_offsets(x, offsets):
    return reverse_segments(x, cu_seqlens=offsets)


def step(carry, x):
    return carry + x, carry


def both_ways(x, lengths):
    inits = jnp.zeros(4), jnp.zeros(4)
    f = lambda scale, carry, x: step(carry, scale * x)  # noqa: E731
    return bidirectional_scan(f, (1.0, 2.0), inits, x, lengths)[1][1]


SCANS = {
    "bidirectional scan": both_ways,
    "scan": lambda x, n: scan_segments(step, jnp.zeros(4), x, n)[1],
    "associative scan": lambda x, n: associative_scan_segments(jnp.add, x, n),
}
PACKED = [[1, 7], [8, 0], [4, 4], [0, 0]]
OFFSETS = [[0, 3, 8], [0, 5, 5], [0, 0, 0], [0, 1, 8]]


def pack(x, n):
    return pack_segments(x[0], n, max_length=4)


def unpack(x, n):
    return unpack_segments(x, n, total_length=9)


# A public function, bad values, the same made good, and what the message must say.
BAD = {
    name: (f, [3, 8, 9, 7], [3, 8, 8, 7], r"lengths\[2\] is 9.* 0 and 8")
    for name, f in {"long": reverse_sequence, **SCANS}.items()
} | {
    "negative": (
        *(reverse_sequence, [3, 8, 0, -2], [3, 8, 0, 2]),
        r"lengths\[3\] is -2",
    ),
    "sum": (
        *(reverse_segments, [[1, 7], [8, 0], [4, 5], [9, 9]], PACKED),
        r"lengths\[2, 1\] is 5.* sum to more than 8",
    ),
    "packed-negative": (
        *(reverse_segments, [[1, 7], [-3, 4], [4, 4], [0, 0]], PACKED),
        r"lengths\[1, 0\] is -3",
    ),
    "decreasing": (
        *(by_offsets, [[0, 3, 8], [0, 5, 2], [0, 0, 0], [0, 1, 8]], OFFSETS),
        r"lengths\[1, 1\] is -3.* cu_seqlens decrease",
    ),
    "pack": (
        *(pack, [3, 6], [3, 5]),
        r"pack_segments: lengths\[1\] is 6.* sum to more than 8, .* axis 0 of x",
    ),
    "unpack-negative": (
        *(unpack, [3, -1, 0, 0], [3, 1, 0, 0]),
        r"unpack_segments: lengths\[1\] is -1.* negative",
    ),
    "unpack": (
        *(unpack, [3, 3, 3, 1], [3, 3, 2, 1]),
        r"unpack_segments: lengths\[3\] is 1.* more than 9, total_length",
    ),
}
each_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


def error_of(f, *args):
    return checkify.checkify(f)(*args)[0].get()


EAGERLY = ("long", "decreasing", "bidirectional scan", "pack")


@pytest.mark.parametrize(
    "bad, jit",
    [(bad, True) for bad in BAD.values()] + [(BAD[name], False) for name in EAGERLY],
    ids=[f"{name}-jit" for name in BAD] + [f"{name}-eager" for name in EAGERLY],
)
def test_reports_row_and_value(bad, jit):
    """Fails on silence, another row, or an error for what is valid."""
    f, wrong, right, message = bad
    checked = checkify.checkify(f)
    if jit:
        f, checked = jax.jit(f), jax.jit(checked)
    assert re.search(message, checked(X, jnp.array(wrong))[0].get())
    error, y = checked(X, jnp.array(right))
    assert error.get() is None
    assert_same_bits(y, f(X, jnp.array(right)))


def scan(f):
    return lambda x, s: lax.scan(
        lambda x, s: (f(x, s), None), x, jnp.stack([jnp.zeros_like(s), s])
    )[0]


def while_loop(f):
    return lambda x, s: lax.while_loop(
        lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, f(carry[1], s)), (0, x)
    )[1]


def gradient(f):
    return jax.grad(lambda x, s: f(x, s).sum())


TRANSFORMS = {
    "vmap": lambda f: jax.vmap(lambda x, s: f(x[None], s[None])[0]),
    "vmap-lengths": lambda f: lambda x, s: jax.vmap(f, (None, 0))(x, s[None]),
    "scan": scan,
    "while": while_loop,
    "cond": lambda f: lambda x, s: lax.cond(x[0, 0] > -1, f, lambda x, s: x, x, s),
    "remat-grad": lambda f: gradient(jax.checkpoint(f)),
    "scan-grad": lambda f: gradient(scan(f)),
}


def errors_of(wrap, x):
    """Of wrong and of right values, by one program for three kinds of encoding."""
    bad = [BAD[kind] for kind in ("long", "sum", "decreasing")]
    checks = [checkify.checkify(wrap(f)) for f, *_ in bad]

    @jax.jit
    def run(values):
        return [check(x, s)[0] for check, s in zip(checks, values, strict=True)]

    wrong, right = (
        [error.get() for error in run([jnp.array(b[i]) for b in bad])] for i in (1, 2)
    )
    numbers = [re.search(r"is (-?\d+)", message)[0] for *_, message in bad]
    return list(zip(numbers, wrong, right, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_under_transformations(transform):
    """Fails on a check that a transformation drops, or that it makes always fail."""
    for number, wrong, right in errors_of(transform, X):
        assert number in wrong
        assert right is None


@pytest.mark.parametrize("transform, x_spec", ((jax.jit, P()), (gradient, P("a"))))
def test_inside_shard_map(transform, x_spec):
    """Fails on a device whose lengths nobody looks at."""

    def local(f):
        return jax.shard_map(
            transform(f), mesh=mesh(), in_specs=(x_spec, P("a")), out_specs=P("a")
        )

    for number, wrong, right in errors_of(local, X if x_spec else X[:1]):
        assert number in wrong
        assert right is None


@pytest.mark.parametrize("kinds", ("auto auto", "explicit explicit"))
def test_sharded(kinds):
    """Fails on a search for the bad row that a sharding stops."""
    over = mesh(kinds)
    for kind in ("long", "sum", "decreasing"):
        f, wrong, right, message = BAD[kind]
        checked = jax.jit(checkify.checkify(f))
        with jax.set_mesh(over):
            x = put(over, X, "a", None)
            error, _ = checked(x, put(over, np.array(wrong), "a"))
            assert re.search(message, error.get())
            error, _ = checked(x, put(over, np.array(right), "a"))
            assert error.get() is None


def test_chexify():
    """Fails if the check is silent under chex, which enables user checks alone."""
    f = chex.chexify(jax.jit(reverse_sequence), async_check=False)
    f(X, jnp.array([1, 2, 3, 4]))
    with pytest.raises(Exception, match=r"lengths\[1\] is 9"):
        f(X, jnp.array([1, 9, 3, 4]))


@pytest.mark.parametrize(
    "dtype, value, size",
    (("int8", -1, 300), ("uint8", 200, 100), ("uint32", 2**32 - 1, 100)),
)
def test_narrow_and_wide_dtypes(dtype, value, size):
    """Fails on a bound that wraps in the dtype of the lengths."""
    lengths = jnp.array([3, value], dtype)
    x = jnp.zeros((2, size))
    assert f"lengths[1] is {value}" in error_of(reverse_sequence, x, lengths)
    packed = jnp.stack([lengths, 0 * lengths], 1)  # No sum, one length alone.
    assert f"lengths[1, 0] is {value}" in error_of(reverse_segments, x, packed)
    good = jnp.array([3, np.minimum(np.iinfo(dtype).max, size)], dtype)
    assert error_of(reverse_sequence, x, good) is None


@pytest.mark.parametrize("dtype", ("int8", "uint8", "uint32"))
def test_decreasing_unsigned_offsets(dtype):
    """Fails on an unsigned difference, which cannot be negative."""
    offsets = jnp.array([0, 5, 2], dtype)
    assert "cu_seqlens decrease" in error_of(by_offsets, X[0], offsets)


NAMED = {
    reverse_sequence: reverse_sequence,
    reverse_segments: by_offsets,
    reverse_segment_order: lambda x, n: reverse_segment_order(x, n)[0],
    pack_segments: lambda x, n: pack_segments(x[0], n[0], max_length=2),
    unpack_segments: lambda x, n: unpack_segments(x[:2], n[0], total_length=7),
    scan_segments: lambda x, n: scan_segments(
        step, jnp.zeros(4), x, cu_seqlens=n, chunk=2
    ),
    bidirectional_scan: both_ways,
    associative_scan_segments: lambda x, n: associative_scan_segments(
        jnp.add, x, cu_seqlens=n
    ),
    bidirectional: lambda x, n: bidirectional(jnp.sin, jnp.sin, x[..., None], n),
}


def test_names_the_function():
    """Fails if the message names another function than the user called."""
    n, packed = jnp.array([3, 9, 0, 1]), jnp.array([[0, 9], [0, 1], [0, 1], [0, 1]])
    single = (reverse_sequence, bidirectional_scan, bidirectional)
    checks = {f: checkify.checkify(call) for f, call in NAMED.items()}
    run = jax.jit(
        lambda: [c(X, n if f in single else packed)[0] for f, c in checks.items()]
    )
    for f, error in zip(NAMED, run(), strict=True):
        assert re.match(rf"{f.__name__}: lengths\[.*\] is \d+", error.get() or "")


def test_only_where_asked_for():
    """Fails if our check runs where the user has not enabled user checks."""
    checked = checkify.checkify(reverse_sequence, errors=checkify.nan_checks)
    assert checked(X, jnp.array([9, 9, 9, 9]))[0].get() is None


@each_bad
def test_free_without_checkify(bad):
    """Fails on an effect, a callback, or a check in every call."""
    f, wrong, *_ = bad
    jaxpr = jax.make_jaxpr(f)(X, jnp.array(wrong))
    assert not jaxpr.effects
    assert "check" not in str(jaxpr)
    text = jax.jit(f).lower(X, jnp.array(wrong)).as_text()
    assert "custom_call" not in text and "callback" not in text


def test_ids_and_nothing_have_no_bad_value():
    """Fails on an error for ids of any value, or for no lengths at all."""
    f = lambda x, s: reverse_segments(x, segment_ids=s, padding_id=-1)  # noqa: E731
    assert error_of(f, X, jnp.full((4, 8), -9)) is None
    assert error_of(reverse_segments, X, jnp.zeros((4, 0), int)) is None
    assert error_of(reverse_sequence, X[:0], jnp.zeros((0,), int)) is None


def test_checks_of_indices_and_floats_find_nothing():
    def run(x, n):
        rows = pack_segments(x[0], n, max_length=4)
        return (
            unpack_segments(rows, n, total_length=9),
            reverse_sequence(x, n, padding_value=0),
            reverse_segment_order(x, n[:, None]),
            scan_segments(lambda c, x: (c + x, c), jnp.zeros(4), x, n),
            associative_scan_segments(jnp.add, x, n),
        )

    def loss(x, n):
        return sum(leaf.sum() for leaf in jax.tree.leaves(run(x, n)))

    few = jnp.array([3, 2, 0, 1])
    check = checkify.checkify(jax.value_and_grad(loss), errors=checkify.all_checks)
    error, _ = jax.jit(check)(X, few)
    assert error.get() is None

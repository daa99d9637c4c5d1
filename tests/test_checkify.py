"""Under checkify, lengths out of range raise, with function, row and value; elsewhere
they cost nothing: no effect in the jaxpr, no callback in the program."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jax_revseg
from jax_revseg import reverse_segments, reverse_sequence, scan_segments
from tests.cases import assert_same_bits
from tests.meshes import make_mesh, put

X = np.arange(32, dtype=np.float32).reshape(4, 8)


def by_offsets(x, offsets):
    return reverse_segments(x, cu_seqlens=offsets)


def step(carry, x):
    return carry + x, carry


def scan_one(x, lengths):
    return scan_segments(step, jnp.zeros(4), x, lengths)[1]


def scan_offsets(x, offsets):
    return scan_segments(step, jnp.zeros(4), x, cu_seqlens=offsets, chunk=2)[1]


def scan_both(x, lengths):
    inits = jnp.zeros(4), jnp.zeros(4)
    f = lambda scale, carry, x: step(carry, scale * x)  # noqa: E731
    return jax_revseg.bidirectional_scan(f, (1.0, 2.0), inits, x, lengths)[1][1]


def associative(x, lengths):
    return jax_revseg.associative_scan_segments(jnp.add, x, lengths)


def layers(x, lengths):
    return jax_revseg.bidirectional(jnp.sin, jnp.sin, x[..., None], lengths)


def pack(x, n):
    return jax_revseg.pack_segments(x[0], n, max_length=4)


def unpack(x, n):
    return jax_revseg.unpack_segments(x, n, total_length=9)


# Wrong values, and the same made good.
PADDED, NEGATIVE = ([3, 8, 9, 7], [3, 8, 8, 7]), ([3, -1, 0, 0], [3, 1, 0, 0])
PACKED = [[1, 7], [8, 0], [4, 5], [9, 9]], [[1, 7], [8, 0], [4, 4], [0, 0]]
OFFSETS = [[0, 3, 8], [0, 5, 2], [0, 0, 0], [0, 1, 8]]
OFFSETS = OFFSETS, [[0, 3, 8], [0, 5, 5], [0, 0, 0], [0, 1, 8]]
BEYOND = [3, 3, 3, 1], [3, 3, 2, 1]
# How the message goes on after the function's name, loosely.
LONG, SUM = r"lengths\[2\] is 9\D.*\b8\b", r"lengths\[2, 1\] is 5\D.*\b8\b"
DECREASE, OF_X = r"lengths\[1, 1\] is -3\D.*cu_seqlens", r"\D.*\b8\b.*axis 0 of x"
TOTAL = r"\D.*\b9\b.*total_length"
# By the function's name: a call, values, the message.
BAD = {
    "reverse_sequence": (reverse_sequence, PADDED, LONG),
    "reverse_sequence negative": (reverse_sequence, NEGATIVE, r"lengths\[1\] is -1"),
    "reverse_segments": (reverse_segments, PACKED, SUM),
    "reverse_segments offsets": (by_offsets, OFFSETS, DECREASE),
    "reverse_segment_order": (jax_revseg.reverse_segment_order, PACKED, SUM),
    "bidirectional": (layers, PADDED, LONG),
    "scan_segments": (scan_one, PADDED, LONG),
    "scan_segments offsets": (scan_offsets, OFFSETS, DECREASE),
    "bidirectional_scan": (scan_both, PADDED, LONG),
    "associative_scan_segments": (associative, PADDED, LONG),
    "pack_segments": (pack, ([3, 6], [3, 5]), r"lengths\[1\] is 6" + OF_X),
    "unpack_segments": (unpack, BEYOND, r"lengths\[3\] is 1" + TOTAL),
    "unpack_segments negative": (unpack, NEGATIVE, r"lengths\[1\] is -1\b"),
}


def says(name, error):
    """Whether the error of a row of the table names function, row and value."""
    return re.match(f"{name.split()[0]}: {BAD[name][2]}", error or "")


def error_of(f, *args):
    return checkify.checkify(f)(*args)[0].get()


def test_reports_function_row_and_value():
    """Fails on silence, another function or row, or an error for what is valid."""

    @jax.jit  # One program, since compiling is what takes the time.
    def run(values):
        return {
            name: (checkify.checkify(call)(X, values[name]), call(X, values[name]))
            for name, (call, *_) in BAD.items()
        }

    wrong, right = (
        run({name: jnp.array(values[i]) for name, (_, values, _) in BAD.items()})
        for i in (0, 1)
    )
    for name in BAD:
        (error, _), _ = wrong[name]
        assert says(name, error.get()), name
        (error, y), unchecked = right[name]
        assert error.get() is None, name
        jax.tree.map(assert_same_bits, y, unchecked)


@pytest.mark.parametrize(
    "name",
    ("reverse_sequence", "reverse_segments offsets", "scan_segments", "pack_segments"),
)
def test_reports_eagerly(name):
    """Fails on silence where the library itself compiles a part of the call."""
    call, (wrong, right), _ = BAD[name]
    assert says(name, error_of(call, X, jnp.array(wrong)))
    assert error_of(call, X, jnp.array(right)) is None


def scan(f):
    turn = lambda x, s: (f(x, s), None)  # noqa: E731
    return lambda x, s: lax.scan(turn, x, jnp.stack([0 * s, s]))[0]


def while_loop(f):
    return lambda x, s: lax.while_loop(
        lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, f(carry[1], s)), (0, x)
    )[1]


def gradient(f):
    return jax.grad(lambda x, s: f(x, s).sum())


TRANSFORMS = {
    "vmap": lambda f: jax.vmap(lambda x, s: f(x[None], s[None])[0]),
    "vmap-lengths": lambda f: lambda x, s: jax.vmap(f, (None, 0))(x, s[None]),
    "while": while_loop,
    "cond": lambda f: lambda x, s: lax.cond(x[0, 0] > -1, f, lambda x, s: x, x, s),
    "remat-grad": lambda f: gradient(jax.checkpoint(f)),
    "scan-grad": lambda f: gradient(scan(f)),
}


TWO = ("reverse_sequence", "reverse_segments offsets")


def errors_of(wrap, x, place=jnp.array):
    """The errors of wrong values of two encodings, by one program."""
    bad = [BAD[name] for name in TWO]
    checks = [checkify.checkify(wrap(call)) for call, *_ in bad]

    @jax.jit
    def run(values):
        return [check(x, s)[0] for check, s in zip(checks, values, strict=True)]

    wrong, right = (run([place(b[1][i]) for b in bad]) for i in (0, 1))
    assert [error.get() for error in right] == [None, None]
    for number, error in zip(("is 9", "is -3"), wrong, strict=True):
        assert number in error.get()
    return [error.get() for error in wrong]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_under_transformations(transform):
    """Fails on a check that a transformation drops, or that it makes always fail."""
    errors_of(transform, X)


@pytest.mark.parametrize("transform, x_spec", ((jax.jit, P()), (gradient, P("a"))))
def test_inside_shard_map(transform, x_spec):
    """Fails on a device whose lengths nobody looks at."""

    def local(f):
        return jax.shard_map(
            transform(f), mesh=make_mesh(), in_specs=(x_spec, P("a")), out_specs=P("a")
        )

    errors_of(local, X if x_spec else X[:1])


@pytest.mark.parametrize("kinds", ("Auto", "Explicit"))
def test_sharded(kinds):
    """Fails on a search for the bad row that a sharding stops."""
    over = make_mesh(kinds)
    with jax.set_mesh(over):
        place = lambda values: put(over, np.array(values), "a")  # noqa: E731
        errors = errors_of(lambda f: f, put(over, X, "a", None), place)
    assert all(map(says, TWO, errors))


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
    packed = jnp.stack([lengths, 0 * lengths], 1)  # No sum, one length alone.
    offsets = jnp.array([[0, 5, 2], [0, 0, 0]], dtype)  # 2 - 5 must be negative.
    good = jnp.array([3, np.minimum(np.iinfo(dtype).max, size)], dtype)

    @jax.jit
    def run(*operands):
        functions = reverse_sequence, reverse_segments, by_offsets, reverse_sequence
        calls = zip(functions, operands, strict=True)
        return [checkify.checkify(f)(jnp.zeros((2, size)), s)[0] for f, s in calls]

    *errors, none = (error.get() for error in run(lengths, packed, offsets, good))
    at = f"[1] is {value}", f"[1, 0] is {value}", "cu_seqlens"
    assert all(part in error for part, error in zip(at, errors, strict=True))
    assert none is None


def test_free_without_checkify():
    """Fails on an effect, a callback, or a check in every call."""

    @jax.jit
    def run(values):
        return [call(X, values[name]) for name, (call, *_) in BAD.items()]

    traced = run.trace({name: jnp.array(bad[1][0]) for name, bad in BAD.items()})
    assert not traced.jaxpr.effects
    assert "check" not in str(traced.jaxpr)
    assert not re.search("custom_call|callback", traced.lower().as_text())


def test_ids_and_nothing_have_no_bad_value():
    """Fails on an error for ids of any value, or for no lengths at all."""
    f = lambda x, s: reverse_segments(x, segment_ids=s, padding_id=-1)  # noqa: E731
    assert error_of(f, X, jnp.full((4, 8), -9)) is None
    assert error_of(reverse_segments, X, jnp.zeros((4, 0), int)) is None
    assert error_of(reverse_sequence, X[:0], jnp.zeros((0,), int)) is None


def test_other_checks_find_nothing():
    """Fails on an index out of bounds, a NaN, or our check where nobody enabled it."""

    def loss(x, values):
        outs = [BAD[name][0](x, s) for name, s in values.items()]
        return sum(leaf.sum() for leaf in jax.tree.leaves(outs))

    most = [name for name in BAD if " " not in name and name != "bidirectional_scan"]
    values = {name: jnp.array(BAD[name][1][0]) for name in most}
    errors = checkify.all_checks - checkify.user_checks
    check = checkify.checkify(jax.value_and_grad(loss), errors=errors)
    assert jax.jit(check)(X, values)[0].get() is None

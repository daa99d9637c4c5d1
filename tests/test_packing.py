"""pack_segments and unpack_segments against the loops, and at their edges."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_revseg
from jax_revseg import _reference, pack_segments, unpack_segments
from tests.cases import assert_same_bits, enable_x64, random_bits
from tests.meshes import with_gradients


def pack(x, lengths, *, max_length, padding_value=0):
    """One row for each segment, cut at `max_length`, padded at its end."""
    out = np.full((len(lengths), max_length, *x.shape[1:]), padding_value, x.dtype)
    for row, (start, end) in enumerate(_reference.packed_bounds(lengths, len(x))):
        for i in range(min(end - start, max_length)):
            out[row, i] = x[start + i]
    return out


def unpack(x, lengths, *, total_length):
    """The valid steps of each row, one row after the other, then zeros."""
    out, steps = np.zeros((total_length, *x.shape[2:]), x.dtype), []
    for row, length in zip(x, lengths, strict=True):
        steps += [*row[: max(int(length), 0)]]
    for t, step in enumerate(steps[:total_length]):
        out[t] = step
    return out


LENGTHS = {
    "some": [2, 4, 0, 1],
    "none": [0, 0, 0, 0],
    "all": [3, 3, 3, 2],
    "one": [0, 11, 0, 0],
    "over": [5, -2, 9, 2**31 - 1],  # Only on a device.
}


def bits(*shape):
    """Random bits with many -0.0, subnormals and NaN payloads."""
    rng = np.random.default_rng(sum(shape))
    x = rng.integers(0, 2**32, shape, np.uint32)
    x.flat[::3], x.flat[1::5], x.flat[2::7] = 2**31, 1, 0x7FA00001
    return x.view(np.float32)


def rows_to_flat(ct, lengths, size):
    """The transpose of packing, in loops: truncated steps get nothing."""
    out, start = np.zeros((size, *ct.shape[2:]), ct.dtype), 0
    for row, length in zip(ct, lengths, strict=True):
        length = max(0, min(length, size - start))
        kept = min(length, ct.shape[1])
        out[start : start + kept] = row[:kept]
        start += length
    return out


def test_values():
    """Fails if a step goes to another row, a cut is elsewhere, padding is not filled,
    or a gradient adds, which changes -0.0, or drops other steps."""

    @partial(jax.jit, static_argnames="size")
    def run(x, ct_x, rows, ct_rows, n, size):
        pack = partial(pack_segments, max_length=size, padding_value=7)
        unpack = partial(unpack_segments, total_length=size)
        packed = with_gradients(pack, x, n, ct_x)
        return *packed, *with_gradients(unpack, rows, n, ct_rows)

    x, rows = bits(11, 2), bits(4, 5, 2)
    for size in (0, 3, 12):  # Less than a segment, and more than all of them.
        ct_x, ct_rows = bits(4, size, 2), bits(size, 2)
        for name, lengths in LENGTHS.items():
            n = np.array(lengths, np.int32)
            packed, to_x, unpacked, to_rows = run(x, ct_x, rows, ct_rows, n, size)
            assert_same_bits(packed, pack(x, n, max_length=size, padding_value=7), name)
            assert_same_bits(to_x, rows_to_flat(ct_x, lengths, 11), name)
            cut = np.minimum(n, 5)
            assert_same_bits(unpacked, unpack(rows, cut, total_length=size), name)
            assert_same_bits(to_rows, pack(ct_rows, cut, max_length=5), name)


def test_starts_in_several_words():
    """Fails if the number of a segment is wrong past the first word of 32 positions."""
    rng = np.random.default_rng(0)
    x = np.arange(300, dtype=np.int32)
    rows = np.arange(90 * 40, dtype=np.int32).reshape(90, 40)
    few = np.where(np.arange(90) % 11, 0, 37)  # Whole words without a start.
    batch = np.stack([few, np.ones(90), *rng.integers(0, 6, (3, 90))]).astype(np.int32)
    sizes = (32, 33, 64, 65, 300)

    @jax.jit
    def run(lengths):
        unpacked = [unpack_segments(rows, lengths, total_length=n) for n in sizes]
        return pack_segments(x, lengths, max_length=40), unpacked

    for lengths in batch:
        packed, unpacked = run(lengths)
        assert_same_bits(packed, pack(x, lengths, max_length=40))
        for n, out in zip(sizes, unpacked, strict=True):
            assert_same_bits(out, unpack(rows, lengths, total_length=n))


@pytest.mark.parametrize("kind", ("some", "all"))
def test_host_lengths(kind):
    """Fails if the checked way through the code gives something else."""
    x = np.arange(11)
    lengths = LENGTHS[kind]
    packed = pack_segments(x, lengths, max_length=4)
    assert_same_bits(packed, pack_segments(x, jnp.array(lengths), max_length=4))
    back = unpack_segments(packed, lengths, total_length=11)
    assert_same_bits(back, np.where(x < sum(lengths), x, 0).astype(back.dtype))
    # Reversing rows and laying them end to end is reversing segments in place.
    rows = jax_revseg.reverse_sequence(packed, lengths)
    there = unpack_segments(rows, jnp.array(lengths), total_length=11)
    assert_same_bits(there, np.asarray(jax_revseg.reverse_segments(back, lengths)))


@pytest.mark.parametrize("dtype", ("bool", "int4", "float8_e4m3fn", "complex64"))
def test_dtypes(dtype):
    """Fails if a dtype loses its values on the way through a row of its own and
    back."""
    x = random_bits(np.random.default_rng(0), (7, 2), dtype)
    if x.itemsize == 1:
        x[x != x] = 1  # XLA computes `where` on small floats in wider ones.
    lengths = jnp.array([2, 4, 0, 1], jnp.int8)
    packed = pack_segments(x, lengths, max_length=4)
    assert_same_bits(packed, pack(x, np.array([2, 4, 0, 1]), max_length=4))
    assert_same_bits(unpack_segments(packed, lengths, total_length=7), x)


def test_keys():
    """Fails if keys, which have no zero, cannot be packed with a key to pad with."""
    keys = jax.random.split(jax.random.key(0), 4)
    out = pack_segments(keys, [1, 2], max_length=2, padding_value=keys[3])
    expected = jax.random.key_data(keys)[np.array([[0, 3], [1, 2]])]
    assert_same_bits(jax.random.key_data(out), expected)


def test_lengths_wider_than_a_position():
    """Fails if a length of 2**32 + 1 is cut to its lower bits, and counts as 1."""
    with enable_x64():
        x, lengths = np.arange(5), jnp.array([1, 2**32 + 1])
        out = pack_segments(x, lengths, max_length=3)
        assert_same_bits(out, np.array([[0, 0, 0], [1, 2, 3]]))
        rows = np.arange(4).reshape(2, 2)
        out = unpack_segments(rows, lengths, total_length=4)
        assert_same_bits(out, np.array([0, 2, 3, 0]))


def test_nothing():
    """Fails if an empty array needs a row or a step that is not there."""
    x = np.ones((3, 2), np.float32)
    for lengths in ([], np.zeros(0, np.int32), jnp.zeros(0, int)):
        assert pack_segments(x, lengths, max_length=2).shape == (0, 2, 2)
        out = unpack_segments(x[None, :0][:0], lengths, total_length=2)
        assert_same_bits(out, np.zeros((2, 2), np.float32))
    for part, lengths in (
        (x[:0], [0, 0]),
        (x[:0], jnp.array([1, 1])),
        (x[:, :0], [1, 2]),
    ):
        packed = pack_segments(part, lengths, max_length=2, padding_value=3)
        assert_same_bits(packed, np.full((2, 2, part.shape[1]), 3, np.float32))
        out = unpack_segments(packed[:, :0], lengths, total_length=1)
        assert_same_bits(out, np.zeros((1, part.shape[1]), np.float32))
    # No room: nothing is left of the rows, and all rows of size 0 fit into nothing.
    assert pack_segments(x, [1, 2], max_length=0).shape == (2, 0, 2)
    rows = np.ones((2, 0, 2))
    assert unpack_segments(rows, [0, 3], total_length=0).shape == (0, 2)


def test_sizes_left_out_for_host_lengths():
    x, n = np.arange(6), jnp.array([1, 1])
    assert pack_segments(x, [2, 0, 3]).tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert unpack_segments(x.reshape(2, 3), [2, 5]).tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(ValueError, match="max_length"):
        pack_segments(x, n)
    with pytest.raises(ValueError, match="total_length"):
        unpack_segments(x.reshape(2, 3), n)


def test_gradient_of_the_padding_value():
    ct = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    padding = np.arange(3) >= np.array([[2], [4], [0], [1]])

    def fill(value):
        n = jnp.array([2, 4, 0, 1])
        return pack_segments(jnp.ones(9), n, max_length=3, padding_value=value)

    assert jax.vjp(fill, 1.0)[1](ct)[0] == ct[padding].sum()


def test_derivatives_of_any_order_gather():
    """Fails on a scatter of data, or if remat or a second order loses a step."""
    n = jnp.array([2, 4, 0, 1])
    for f, kept in (
        (partial(pack_segments, max_length=3), rows_to_flat(np.ones((4, 3)), n, 11)),
        (partial(unpack_segments, total_length=9), np.arange(5) < np.array(n)[:, None]),
    ):
        kept = np.stack([kept, kept], -1)
        x = np.arange(kept.size, dtype=np.float32).reshape(kept.shape) % 7 - 3

        @jax.jit
        def run(x, f=f):
            """Of the sum of the cubes of the steps that are kept."""
            grad = jax.grad(jax.checkpoint(lambda x: (f(x, n) ** 3).sum()))
            second = jax.grad(lambda x: (grad(x) ** 2).sum())(x)
            return second, jax.vmap(grad)(x[None])[0]

        compiled = run.lower(x).compile()
        # The table of rows, and words of bits, may be scattered: integers.
        assert not re.search(r"= (?![su]32)\S+ scatter\(", compiled.as_text())
        for got, want in zip(compiled(x), (36 * x**3, 3 * x**2), strict=True):
            np.testing.assert_array_equal(got, want * kept)  # Integers: exact.


@pytest.mark.parametrize("axes", ((1, 1), (2, None), (None, 0)))
def test_mapped_over_any_operand(axes):
    lengths = np.array([[2, 4, 0, 1], [9, 9, -1, 0], [0, 0, 3, 8]], np.int32)

    def check(call, xs, cts):
        run = partial(with_gradients, call)
        pairs = list(zip((xs, lengths), axes, strict=True))
        operands = (a[0] if i is None else np.moveaxis(a, 0, i) for a, i in pairs)
        mapped = jax.jit(jax.vmap(run, (*axes, 0)))(*operands, cts)
        one = lambda b: [a[0 if i is None else b] for a, i in pairs]  # noqa: E731
        rows = [jax.jit(run)(*one(b), cts[b]) for b in range(3)]
        for got, *want in zip(mapped, *rows, strict=True):
            assert_same_bits(got, np.stack(want))

    check(partial(pack_segments, max_length=3), bits(3, 11, 2), bits(3, 4, 3, 2))
    check(partial(unpack_segments, total_length=9), bits(3, 4, 5, 2), bits(3, 9, 2))


def test_empty_results_stay_on_their_device():
    device = jax.devices()[3]
    put = partial(jax.device_put, device=device)
    for out in (
        pack_segments(put(jnp.ones((0, 2))), [0, 0], max_length=2),
        unpack_segments(put(jnp.ones((0, 3, 2))), [], total_length=2),
        unpack_segments(put(jnp.ones((2, 0, 2))), [0, 0], total_length=2),
    ):
        assert out.devices() == {device}

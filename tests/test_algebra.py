"""Identities that hold for any data: they need no reference to be believed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import (
    pack_segments,
    reverse_segment_order,
    reverse_segments,
    reverse_sequence,
    unpack_segments,
)
from tests.cases import KINDS, SMALL, assert_same_bits

by_name = functools.partial(pytest.mark.parametrize, ids=lambda case: case.name)


@by_name("case", KINDS)
def test_involution(case):
    """Fails if reversed twice, something is not where it was."""
    x, segments = case.x(), jnp.asarray(case.segments())
    once = case.call(x, segments)
    assert_same_bits(case.call(once, segments), x)
    if case.lengths == "full":  # Otherwise the identity would pass.
        assert (np.asarray(once) != x).any()


@by_name("case", SMALL)
def test_orthogonality(case):
    """Fails if <rev x, y> differs from <x, rev y>."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(-9, 9, (2, *case.shape), np.int32)
    segments = jnp.asarray(case.segments())
    left = np.vdot(case.call(x, segments), y)
    assert left == np.vdot(x, case.call(y, segments))
    assert left != np.vdot(x, y)


def test_encodings_agree():
    """Fails if the same segments in another encoding give another result."""
    x = np.arange(20, dtype=np.int32)
    lengths = [3, 0, 5, 1, 6]
    ids = np.repeat([1, 2, 3, 4, 5, 0], [*lengths, 5])
    packed = reverse_segments(x, lengths)
    assert_same_bits(reverse_segments(x, cu_seqlens=np.cumsum([0, *lengths])), packed)
    assert_same_bits(reverse_segments(x, segment_ids=ids, padding_id=0), packed)
    assert_same_bits(reverse_segments(x, [7]), reverse_sequence(x, 7))


def test_left_padding():
    """Fails if a mask does not do what its recipe promises."""
    x = np.array([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]], np.int32)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    out = reverse_segments(x, segment_ids=mask.astype(int), padding_id=0)
    assert_same_bits(out, np.array([[0, 0, 3, 2, 1], [8, 7, 6, 5, 4]], np.int32))


@pytest.mark.parametrize("tail", (0, 4))
def test_reversing_the_packed_form(tail):
    """Fails if reversing rows and laying them end to end is not reversing segments in
    place."""
    lengths = np.array([2, 4, 0, 1])
    x = np.random.default_rng(0).standard_normal((7 + tail, 3)).astype(np.float32)
    rows = pack_segments(x, lengths, max_length=5)
    there = unpack_segments(
        reverse_sequence(rows, lengths), lengths, total_length=7 + tail
    )
    x[7:] = 0  # A tail is not packed, and comes back as zeros.
    assert_same_bits(there, np.asarray(reverse_segments(x, lengths)))
    back = unpack_segments(rows, lengths, total_length=7 + tail)
    assert_same_bits(back, x)


def test_example_of_the_order():
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    out, lengths = reverse_segment_order(x, [2, 4])
    assert_same_bits(out, x[[2, 3, 4, 5, 0, 1]])
    assert_same_bits(lengths, np.array([4, 2], np.int32))
    again, lengths = reverse_segment_order(out, lengths)
    assert_same_bits(again, x)
    assert_same_bits(lengths, np.array([2, 4], np.int32))


def test_order_is_two_reversals():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9)).astype(np.float32)
    lengths = jnp.array([[4, 0, 2], [3, 3, 3], [0, 1, 0]])

    @jax.jit
    def run(x):
        out, flipped = reverse_segment_order(x, lengths)
        return reverse_segments(out, flipped), reverse_sequence(x, lengths.sum(-1))

    assert_same_bits(*run(x))

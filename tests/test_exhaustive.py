"""Every segmentation of an axis of up to 9 steps, in every encoding."""

import jax
import jax.export
import numpy as np
import pytest

import jax_revseg
from jax_revseg import _reference, reverse_segments, reverse_sequence
from tests.cases import assert_same_bits, reverse_order

AXES = dict(axis=1, batch_axes=(0,))


def segmentations(size):
    """Every list of segments, none empty, of sum `size` or less: 2**size of them."""
    yield []
    for first in range(1, size + 1):
        yield from ([first, *rest] for rest in segmentations(size - first))


def encodings(size):
    """One row for each segmentation: packed lengths, ids, offsets."""
    rows = list(segmentations(size))
    lengths = np.zeros((len(rows), size + 2), np.int32)  # Two are empty, at least.
    ids = np.zeros((len(rows), size), np.int32)
    for n, row in enumerate(rows):
        # Empty segments lie at the end in one row, between the others in the next.
        step = 1 if n % 2 or 2 * len(row) > size + 1 else 2
        lengths[n, step - 1 : step - 1 + step * len(row) : step] = row
        # Two segments that touch have different ids, and may well be equal to others.
        ids[n, : sum(row)] = np.repeat(1 + np.arange(len(row)) % 2, row)
    offsets = np.concatenate([np.zeros_like(lengths[:, :1]), lengths.cumsum(1)], 1)
    return lengths, ids, offsets.astype(np.int32)


@pytest.mark.parametrize("size", (1, 2, 6, 9))
def test_every_segmentation(size):
    """Fails if some arrangement of boundaries and tail is reversed wrongly."""
    lengths, ids, offsets = encodings(size)
    assert len(lengths) == 2**size
    assert len(np.unique(ids, axis=0)) == 2**size  # No row is tried twice.
    x = np.arange(lengths.shape[0] * size, dtype=np.int32).reshape(-1, size)
    every_length = np.arange(size + 1, dtype=np.int32)

    @jax.jit  # One program, since compiling is what takes the time.
    def run(x, lengths, ids, offsets, every_length):
        return (
            reverse_segments(x, lengths),
            reverse_segments(x, cu_seqlens=offsets),
            reverse_segments(x, segment_ids=ids, padding_id=0),
            reverse_segments(x, segment_ids=ids),
            reverse_sequence(x[: size + 1], every_length),
            *jax_revseg.reverse_segment_order(x, lengths),
        )

    reversed_ = _reference.reverse(x, lengths, layout="packed", **AXES)
    # Without a padding_id, the tail is one more segment.
    tail = np.c_[lengths, size - lengths.sum(1, keepdims=True)]
    expected = (
        *[reversed_] * 3,
        _reference.reverse(x, tail, layout="packed", **AXES),
        _reference.reverse(x[: size + 1], every_length, layout="padded", **AXES),
        *reverse_order(x, lengths, **AXES),
    )
    outs = run(x, lengths, ids, offsets, every_length)
    for number, (out, want) in enumerate(zip(outs, expected, strict=True)):
        assert_same_bits(out, want, f"result {number}")


def test_sizes_around_words():
    """Fails if the end of a word of 32 positions, or a larger tree, is wrong."""
    rng = np.random.default_rng(0)
    # Past 32 words, each of 32 positions, there is a level more: twice so in the last.
    sizes = (31, 32, 1023, 1024, 33_000)
    arguments, expected = [], []
    for size in sizes:
        x = np.arange(2 * size, dtype=np.int32).reshape(2, size)
        # Dense and sparse boundaries: long segments pass over words without one.
        starts = np.sort(rng.integers(0, size, (2, 5)), -1)
        starts[1, 1:4] = starts[1, 0] + np.arange(1, 4)
        starts[0, 4] = size // 32 * 32  # The tail begins where a word does.
        starts = np.minimum(starts, starts[:, 4:])
        ids = (np.arange(size) >= starts[..., None]).sum(1).astype(np.int32)
        lengths = np.stack([np.bincount(row, minlength=6) for row in ids])[:, :5]
        arguments.append((x, ids, lengths.astype(np.int32)))
        want = _reference.reverse(x, ids, layout="ids", padding_id=5, **AXES)
        expected.append(want)
        by_lengths = _reference.reverse(x, lengths, layout="packed", **AXES)
        np.testing.assert_array_equal(by_lengths, want)

    def run(x, ids, lengths):
        by_ids = reverse_segments(x, segment_ids=ids, padding_id=5)
        return by_ids, reverse_segments(x, lengths)

    t = jax.export.symbolic_shape("t")
    types = [jax.ShapeDtypeStruct((2, n), np.int32) for n in (*t, *t, 5)]
    symbolic = jax.export.export(jax.jit(run))(*types)
    known = jax.jit(lambda arguments: [run(*a) for a in arguments])(arguments)
    for size, given, want, outs in zip(sizes, arguments, expected, known, strict=True):
        if size in (32, 1024, 33_000):
            outs = (*outs, *symbolic.call(*given))
        for out in outs:
            assert_same_bits(out, want, f"{size}")

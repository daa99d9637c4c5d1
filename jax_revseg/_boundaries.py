"""The source index of any segmentation, from bits that mark the starts of segments.

Each position needs the last boundary at or before it and the first boundary after it.
A word holds the bits of 32 positions. A position finds a boundary in its own word, or
shares the answer with all positions of that word. For words the question is the same:
which is the last non-empty word before, which the first after? The answer is a search
tree of degree 32: no sequential step, no cost per segment, and no array longer than
1/32 of the segment axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_WORD = jnp.uint32  # Of bits, and of positions: the latter are exact modulo 2**32.
_FEW = 32  # Up to here comparing all pairs of words costs less than another level.


def _iota(shape, dimension: int) -> jax.Array:
    return lax.broadcasted_iota(_WORD, shape, dimension)


def _last_bit(word: jax.Array) -> jax.Array:
    return 31 - lax.clz(word)


def _first_bit(word: jax.Array) -> jax.Array:
    return _last_bit(word & (0 - word))


def to_words(bits: jax.Array) -> jax.Array:
    """Packs booleans `(..., M)` into words `(..., ceil(M / 32))`, lowest bit first."""
    size = bits.shape[-1]
    count = (size + 31) // 32
    padding = [(0, 0, 0)] * (bits.ndim - 1) + [(0, 32 * count - size, 0)]
    bits = lax.pad(bits.astype(_WORD), _WORD(0), padding)
    bits = bits.reshape(*bits.shape[:-1], count, 32)
    return jnp.sum(bits << _iota(bits.shape, bits.ndim - 1), -1, dtype=_WORD)


def shift(values: jax.Array, by: int, edge: int = 0, axis: int = -1) -> jax.Array:
    """Moves an axis by some positions, and fills the free end with `edge`."""
    sides = [(0, 0, 0)] * values.ndim
    sides[axis] = by, -by, 0
    return lax.pad(values, jnp.asarray(edge, values.dtype), sides)


def take_last(values: jax.Array, index: jax.Array) -> jax.Array:
    """Indexes the last axis of each row."""
    last = values.ndim - 1
    rows = tuple(range(last))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(last,),
        start_index_map=(last,),
        operand_batching_dims=rows,
        start_indices_batching_dims=rows,
    )
    index = index[..., None]
    return lax.gather(values, index, numbers, (1,) * values.ndim, mode="clip")


def _around_words(words: jax.Array, level: int) -> tuple[jax.Array, jax.Array]:
    """For each word, the last set position before it and the first after it."""
    count, last = words.shape[-1], words.ndim - 1
    first = 32 * _iota(words.shape, last)
    low, high = first + _first_bit(words), first + _last_bit(words)
    # A symbolic number gets two levels: 2**20 pairs of words for 2**25 positions.
    if count <= _FEW if isinstance(count, int) else level == 2:
        pairs = (*words.shape, count)
        word, other = _iota(pairs, last), _iota(pairs, last + 1)
        some = (words != 0)[..., None, :]
        high = jnp.where(some & (other < word), high[..., None, :], 0)
        low = jnp.where(some & (other > word), low[..., None, :], ~_WORD(0))
        return jnp.max(high, -1), jnp.min(low, -1)
    around = around_bits(to_words(words != 0), level + 1)
    before, after = (lax.slice_in_dim(at, 0, count, axis=last) for at in around)
    return take_last(high, before), take_last(low, after)


def around_bits(words: jax.Array, level: int = 0) -> tuple[jax.Array, jax.Array]:
    """For each position, the last set one at or before it and the first after it.

    Past level 0, where a bit stands for a word: the last before it.
    """
    before, after = _around_words(words, level)
    if level == 0:
        # Without the barrier XLA:GPU fuses the tree into the gather and recomputes it
        # for every element.
        before, after = lax.optimization_barrier((before, after))
    shape = (*words.shape, 32)
    first, bit = _iota(shape, len(shape) - 2) * 32, _iota(shape, len(shape) - 1)
    upto = (_WORD(2) << bit) - 1
    below = words[..., None] & (upto >> 1 if level else upto)
    above = words[..., None] & ~upto
    before = jnp.where(below != 0, first + _last_bit(below), before[..., None])
    after = jnp.where(above != 0, first + _first_bit(above), after[..., None])
    flat = (*words.shape[:-1], 32 * words.shape[-1])
    return before.reshape(flat), after.reshape(flat)


def reverse_between(words: jax.Array, size: int) -> jax.Array:
    """The source index where every set bit starts a segment.

    Bits 0 and `size` must be set, the latter in the last word.
    """
    before, after = around_bits(words)
    index = before + after - 1 - _iota(before.shape, before.ndim - 1)
    return index[..., :size]

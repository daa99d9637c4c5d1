"""What a user may write, for a strict type checker: read by pyright, and run as well.

Its arrays come from NumPy, and from the functions themselves: to a strict checker JAX's
own constructors are partly unknown.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import (
    bidirectional,
    pack_segments,
    reverse_segment_order,
    reverse_segments,
    reverse_segments_p,
    reverse_sequence,
    unpack_segments,
)

x = reverse_sequence(np.ones((2, 5, 3), np.float32), [5, 5])
lengths = reverse_sequence(np.array([5, 3]), 2)

# Arrays of JAX and NumPy, and lists, as the documentation writes them.
assert_type(reverse_sequence(x, lengths), jax.Array)
assert_type(reverse_sequence(np.ones((2, 5)), np.array([3, 5])), jax.Array)
assert_type(reverse_sequence(x[0], 3), jax.Array)
assert_type(reverse_sequence(x, [3, 5], axis=-2, batch_axis=(0,)), jax.Array)
assert_type(reverse_sequence(x, lengths, padding_value=0.0), jax.Array)
assert_type(reverse_segments(x, [[1, 2], [2, 3]], batch_axis=0), jax.Array)
assert_type(reverse_segments(x[0], cu_seqlens=[0, 2, 5]), jax.Array)
mask = x[..., 0] > 0
ids = mask.astype(int)
assert_type(reverse_segments(x, segment_ids=ids, padding_id=0), jax.Array)

values, order = reverse_segment_order(x, [[1, 2], [2, 3]])
assert_type(values, jax.Array)
assert_type(order, jax.Array)

packed = pack_segments(np.arange(5), [2, 3], max_length=3, padding_value=-1)
assert_type(packed, jax.Array)
assert_type(unpack_segments(packed, [2, 3], total_length=5), jax.Array)


def total(x: jax.Array) -> jax.Array:
    return jnp.cumsum(x, axis=1)


def add(forward: jax.Array, backward: jax.Array) -> jax.Array:
    return forward + backward


def loss(x: jax.Array) -> jax.Array:
    both: jax.Array = bidirectional(total, total, x, lengths, axis=1, merge=add)
    return both.sum()


assert_type(loss(x), jax.Array)
name: str = reverse_segments_p.name

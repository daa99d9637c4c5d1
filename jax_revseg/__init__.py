"""Reverse the segments of ragged sequences in JAX; padding stays where it is.

    lengths = [3, 5]     a b c . .         c b a . .
                         d e f g h   -->   h g f e d

    >>> import jax.numpy as jnp
    >>> from jax_revseg import reverse_sequence
    >>> x = jnp.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    >>> reverse_sequence(x, jnp.array([3, 5]))
    Array([[3, 2, 1, 0, 0],
           [8, 7, 6, 5, 4]], dtype=int32)

Which function:

- `reverse_sequence`: one segment a row, `x` of shape `(N, T, ...)` and lengths `(N,)`;
  with `axis=0`, time-major.
- `reverse_segments`: several segments a row, by lengths `(N, K)`, by ids `(N, T)` (also
  masks and left padding), or by cumulative offsets.
- `reverse_segment_order`: the order of the segments, not their content.
- `pack_segments`, `unpack_segments`: from a flat axis to padded rows, and back.
- `scan_segments`: `jax.lax.scan` that skips padding and restarts at segments.
- `associative_scan_segments`: `jax.lax.associative_scan` that restarts at segments.
- `bidirectional`: a bidirectional layer from two layers that run forward.
- `bidirectional_scan`: both directions of a recurrence in one loop.
- `reverse_segments_p`: the JAX primitive under the reversals.

All functions work under `jit`, `vmap`, `grad` and `shard_map`. The gradient of a
reversal is the same reversal. Lengths on the host are checked at the call. Lengths in
JAX arrays are clipped, so no read is out of bounds; `jax.experimental.checkify` checks
them.

`python -m jax_revseg` checks and times the reversals on the devices of this machine.
"""

from jax_revseg._api import (
    reverse_segment_order as reverse_segment_order,
    reverse_segments as reverse_segments,
    reverse_sequence as reverse_sequence,
)
from jax_revseg._bidirectional import bidirectional as bidirectional
from jax_revseg._packing import (
    pack_segments as pack_segments,
    unpack_segments as unpack_segments,
)
from jax_revseg._primitive import reverse_segments_p as reverse_segments_p
from jax_revseg._scan import (
    associative_scan_segments as associative_scan_segments,
    bidirectional_scan as bidirectional_scan,
    scan_segments as scan_segments,
)

__version__ = "0.1.0"

__all__ = [
    "associative_scan_segments",
    "bidirectional",
    "bidirectional_scan",
    "pack_segments",
    "reverse_segment_order",
    "reverse_segments",
    "reverse_segments_p",
    "reverse_sequence",
    "scan_segments",
    "unpack_segments",
]

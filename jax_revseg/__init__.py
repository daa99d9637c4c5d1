"""Reverse the segments of ragged sequences in JAX."""

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

__version__ = "0.1.0"

__all__ = [
    "bidirectional",
    "pack_segments",
    "reverse_segment_order",
    "reverse_segments",
    "reverse_segments_p",
    "reverse_sequence",
    "unpack_segments",
]

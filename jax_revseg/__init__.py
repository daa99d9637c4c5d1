"""Reverse the segments of ragged sequences in JAX."""

from jax_revseg._api import (
    reverse_segment_order as reverse_segment_order,
)
from jax_revseg._api import (
    reverse_segments as reverse_segments,
)
from jax_revseg._api import (
    reverse_sequence as reverse_sequence,
)
from jax_revseg._primitive import reverse_segments_p as reverse_segments_p

__version__ = "0.1.0"

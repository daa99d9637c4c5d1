"""The same bytes from other frameworks, on every case that they accept.

ONNX Runtime's ReverseSequence is in test_onnx.py.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import reverse_sequence
from tests.cases import AXES, KINDS, TYPES, WIDE, assert_same_bits

pytestmark = pytest.mark.peers

# The padded cases, since no peer has another encoding, in every dtype. One batch axis
# and nothing out of range or empty: the rest they refuse. 64 bits need another mode.
PADDED = [case for case in (*KINDS, *AXES) if case.layout == "padded"]
EVERY_TYPE = [replace(case, name=case.dtype, layout="padded") for case in TYPES]
COMMON = [
    case
    for case in (*PADDED, *EVERY_TYPE)
    if len(case.batch_axes) == 1
    and case.lengths != "over"
    and 0 not in case.shape
    and case.dtype not in WIDE
]


# What TensorFlow must have taken, lest a comparison be one of nothing.
AT_LEAST = {case.name for case in PADDED if case in COMMON}
AT_LEAST |= {"bool", "int8", "uint8", "int16", "int32", "float16", "float32"}
AT_LEAST |= {"bfloat16", "complex64"}


def test_tensorflow():
    """TensorFlow users get other values from reverse_sequence here than there."""
    tf = pytest.importorskip("tensorflow")
    names = set()
    for case in COMMON:
        (batch_axis,) = case.batch_axes
        try:
            theirs = tf.reverse_sequence(
                case.x(), case.segments(), seq_axis=case.axis, batch_axis=batch_axis
            )
        except (tf.errors.OpError, TypeError, ValueError, NotImplementedError):
            continue
        # Their dtype may come from another package.
        ours = case.call(case.x(), jnp.asarray(case.segments()))
        assert_same_bits(theirs.numpy().view(ours.dtype), ours, case.name)
        names.add(case.name)
    assert names >= AT_LEAST


def test_flax_flip_sequences():
    """On valid steps, flip_sequences and ours disagree; beyond, they do by design."""
    flip_sequences = pytest.importorskip("flax.nnx").nn.recurrent.flip_sequences
    for case in (KINDS[0], KINDS[3]):
        x, lengths = case.x(), case.segments()
        valid = (np.arange(case.size) < lengths[:, None])[..., None]
        got = np.asarray(case.call(x, lengths))
        assert_same_bits(np.where(valid, x, got), x)  # Ours keeps the padding.
        for axis in (0, 1):
            given = jnp.moveaxis(x, 1, axis)
            theirs = jnp.moveaxis(flip_sequences(given, lengths, 1, axis == 0), axis, 1)
            assert_same_bits(np.where(valid, got, 0), np.where(valid, theirs, 0))


def test_tensors_of_other_frameworks_are_operands():
    """Fails if a tensor is refused, or aborts the process, as one of strings did."""
    torch, tf = map(pytest.importorskip, ("torch", "tensorflow"))
    x, lengths = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 3])
    expected = np.asarray(reverse_sequence(x, lengths))
    for tensor in (torch.tensor, tf.constant):
        assert_same_bits(reverse_sequence(tensor(x), tensor(lengths)), expected)
    with pytest.raises(TypeError, match="x must be .* torch.float32.*detach"):
        reverse_sequence(torch.tensor(x, requires_grad=True), lengths)
    with pytest.raises(TypeError, match="x must be .*string"):
        reverse_sequence(tf.constant(["a"]), 1)

"""The same bytes from other frameworks, on every case that they accept."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import reverse_sequence
from tests.cases import AXES, KINDS, TYPES, WIDE, Case, assert_same_bits

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


def need(*modules):
    """Skips where a peer is missing, and says which."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def ours(case):
    return case.call(case.x(), jnp.asarray(case.segments()))


def same_values(actual, case):
    """A peer's bytes under our dtype: theirs may come from another package."""
    expected = ours(case)
    actual = np.asarray(actual).view(expected.dtype)
    assert_same_bits(actual, expected, case.name)


def accepted(call, cases, errors):
    """Compares on all that the peer accepts, and returns the names of those."""
    names = []
    for case in cases:
        try:
            theirs = call(case)
        except errors:
            continue
        same_values(theirs, case)
        names.append(case.name)
    return names


# What a peer must have taken, lest a comparison be one of nothing.
AT_LEAST = {case.name for case in PADDED if case in COMMON}
AT_LEAST |= {"bool", "int8", "uint8", "int16", "int32", "float16", "float32"}


def test_tensorflow():
    """TensorFlow users get other values from reverse_sequence here than there."""
    need("tensorflow")
    import tensorflow as tf

    def call(case):
        (batch_axis,) = case.batch_axes
        return tf.reverse_sequence(
            case.x(), case.segments(), seq_axis=case.axis, batch_axis=batch_axis
        ).numpy()

    errors = (tf.errors.OpError, TypeError, ValueError, NotImplementedError)
    names = accepted(call, COMMON, errors)
    assert AT_LEAST | {"bfloat16", "complex64"} <= set(names)


def test_tensorflow_gradient():
    """TensorFlow users get another gradient here than there."""
    need("tensorflow")
    import tensorflow as tf

    case = KINDS[0]
    x, cotangent, lengths = case.x(), case.x()[::-1], case.segments()
    with tf.GradientTape() as tape:
        watched = tf.constant(x)
        tape.watch(watched)
        out = tf.reverse_sequence(watched, lengths, seq_axis=1, batch_axis=0)
    theirs = tape.gradient(out, watched, output_gradients=tf.constant(cotangent))
    (got,) = jax.vjp(lambda x: reverse_sequence(x, lengths), x)[1](
        jnp.asarray(cotangent)
    )
    assert_same_bits(got, theirs.numpy())


def test_onnx_runtime():
    """A model exported to ONNX with ReverseSequence gives other values than ours."""
    need("onnx", "onnxruntime")
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    def call(case):
        x, lengths = case.x(), case.segments().astype(np.int64)
        (batch_axis,) = case.batch_axes
        kind = helper.np_dtype_to_tensor_dtype(x.dtype)
        node = helper.make_node(
            *("ReverseSequence", ["x", "lengths"], ["out"]),
            time_axis=case.axis,
            batch_axis=batch_axis,
        )
        graph = helper.make_graph(
            [node],
            "reverse",
            [
                helper.make_tensor_value_info("x", kind, x.shape),
                helper.make_tensor_value_info(
                    "lengths", TensorProto.INT64, lengths.shape
                ),
            ],
            [helper.make_tensor_value_info("out", kind, x.shape)],
        )
        opset = [helper.make_opsetid("", 10)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(None, {"x": x, "lengths": lengths})[0]

    # ONNX knows batch and time as the first two axes only.
    cases = [c for c in COMMON if {c.axis, *c.batch_axes} == {0, 1}]
    cases.append(Case("time-major", (7, 3, 2), axis=0, batch_axes=(1,)))
    refusals = onnxruntime.capi.onnxruntime_pybind11_state
    errors = (KeyError, ValueError, onnx.checker.ValidationError)
    errors += (refusals.InvalidGraph, refusals.NotImplemented, refusals.Fail)
    names = accepted(call, cases, errors)
    assert AT_LEAST & {case.name for case in cases} <= set(names)
    assert "time-major" in names


def test_flax():
    """On valid steps, flip_sequences and ours disagree; beyond, they do by design."""
    need("flax")
    from flax.nnx.nn.recurrent import flip_sequences

    for case in (KINDS[0], KINDS[3]):
        x, lengths = case.x(), case.segments()
        theirs = np.asarray(
            flip_sequences(
                jnp.asarray(x), jnp.asarray(lengths), num_batch_dims=1, time_major=False
            )
        )
        valid = (np.arange(case.size) < lengths[:, None])[..., None]
        got = np.asarray(ours(case))
        assert_same_bits(np.where(valid, got, 0), np.where(valid, theirs, 0))
        assert_same_bits(np.where(valid, x, got), x)  # Ours keeps the padding.


def test_numpy():
    """The reference is wrong where NumPy's own flip of each row is right."""

    def call(case):
        x, out = case.x(), case.x()
        (batch_axis,) = case.batch_axes
        for row, length in enumerate(case.segments()):
            at = [slice(None)] * x.ndim
            at[batch_axis], at[case.axis] = slice(row, row + 1), slice(0, length)
            out[tuple(at)] = np.flip(x[tuple(at)], case.axis)
        return out

    cases = [case for case in COMMON if case in PADDED]
    assert len(accepted(call, cases, ())) == len(cases)

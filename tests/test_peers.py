"""The same bytes from other frameworks, on every case that they accept.

Beside our own cases stand those of the frameworks' tests of the same operator: their
shapes, lengths, expected values and refusals.
"""

import importlib
import importlib.util
import unittest
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import reverse_segments, reverse_sequence
from tests.cases import (
    AXES,
    KINDS,
    TYPES,
    WIDE,
    Case,
    assert_same_bits,
    enable_x64,
    random_bits,
)

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


# TensorFlow's reverse_sequence_op_test: dtypes of x and of the lengths.
OP_TEST = [("float32", "int32")]
OP_TEST += [
    (dtype, "int64")
    for dtype in ("float32", "float64", "int32", "int64", "complex64", "complex128")
]


def test_tensorflow_op_test():
    """TensorFlow's own expected values, or its gradients, differ from ours."""
    need("tensorflow")
    import tensorflow as tf

    def time_major(rows):
        return np.array(rows).reshape(3, 2, 4, 1, 1).transpose(2, 1, 0, 3, 4)

    x = time_major(np.arange(1, 25))
    rows = [[3, 2, 1, 4], [7, 6, 5, 8]]
    rows += [[9, 10, 11, 12], [13, 14, 15, 16]]
    rows += [[20, 19, 18, 17], [24, 23, 22, 21]]
    expected = time_major(rows)
    with enable_x64():
        for dtype, lengths_dtype in OP_TEST:
            lengths = np.array([3, 0, 4], lengths_dtype)
            operand, cotangent = x.astype(dtype), (100 * x).astype(dtype)
            with tf.GradientTape() as tape:
                watched = tf.constant(operand)
                tape.watch(watched)
                theirs = tf.reverse_sequence(watched, lengths, seq_axis=0, batch_axis=2)

            ours = partial(
                reverse_sequence, lengths=jnp.asarray(lengths), axis=0, batch_axis=2
            )
            got = ours(jnp.asarray(operand))
            assert_same_bits(got, expected.astype(dtype), dtype)
            assert_same_bits(got, theirs.numpy(), dtype)
            if jnp.issubdtype(dtype, jnp.inexact):
                (got,) = jax.vjp(ours, operand)[1](jnp.asarray(cotangent))
                want = tape.gradient(theirs, watched, tf.constant(cotangent))
                assert_same_bits(got, want.numpy(), dtype)


def test_tensorflow_errors():
    """What TensorFlow refuses passes here, or the corrected call is refused."""
    need("tensorflow")
    import tensorflow as tf

    x = np.array([[1, 2], [3, 4]])
    same = reverse_sequence(x, [2, 2], axis=1, batch_axis=0)
    np.testing.assert_array_equal(same, tf.reverse_sequence(x, [2, 2], 1, 0))
    np.testing.assert_array_equal(same, [[2, 1], [4, 3]])
    for lengths, axis, batch_axis, message in (
        ([2, 2, 2], 1, 0, r"sizes \(2,\), but lengths has \(3,\)"),
        ([2], 1, 0, r"sizes \(2,\), but lengths has \(1,\)"),
        ([[2, 2]], 1, 0, "lengths has 2 batch axes"),
        ([2, 2], 2, 0, "axis is 2, but x has rank 2"),
        ([2, 2], 1, 3, "batch_axis is 3, but x has rank 2"),
        ([2, 2], 0, 0, "must name different axes"),
        ([2, 3], 1, 0, r"lengths\[1\] is 3"),
        ([2, -1], 1, 0, r"lengths\[1\] is -1"),
        ([2.0, 2.0], 1, 0, "lengths has dtype float64"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            tf.reverse_sequence(x, lengths, axis, batch_axis)
        with pytest.raises((TypeError, ValueError), match=message):
            reverse_sequence(x, lengths, axis=axis, batch_axis=batch_axis)


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


def test_onnx_node_tests(monkeypatch):
    """ONNX's own tests of ReverseSequence, with ours as the backend."""
    need("onnx")
    import onnx.backend.base
    import onnx.backend.test

    ran = []

    class Model(onnx.backend.base.BackendRep):
        def __init__(self, axes):
            self.axes = axes

        def run(self, inputs, **_):
            x, lengths = inputs
            return (np.asarray(reverse_sequence(x, lengths, **self.axes)),)

    class Backend(onnx.backend.base.Backend):
        @classmethod
        def prepare(cls, model, device="CPU", **_):
            ran.append(model.graph.name)
            (node,) = model.graph.node
            assert node.op_type == "ReverseSequence"
            given = {a.name: a.i for a in node.attribute}
            axis, batch_axis = given.get("time_axis", 0), given.get("batch_axis", 1)
            return Model(dict(axis=axis, batch_axis=batch_axis))

        @classmethod
        def supports_device(cls, device):
            return device == "CPU"

    def import_ours(_):
        importlib.import_module("onnx.backend.test.case.node.reversesequence")

    # Every other operator's tests take five seconds to make, with warnings.
    monkeypatch.setattr("onnx.backend.test.loader.import_recursive", import_ours)
    tests = onnx.backend.test.BackendTest(Backend, __name__).include("reversesequence")
    result = unittest.TestResult()
    tests.test_suite.run(result)
    assert not result.errors + result.failures
    assert {"test_reversesequence_time", "test_reversesequence_batch"} <= set(ran)


@pytest.mark.parametrize(
    "shape, lengths",
    (
        ((10, 3, 4), [2, 3, 5]),
        ((12, 10), [4, 5, 3]),
        ((12, 10), [12]),
        ((12, 10), [3, 0, 6, 3]),
        ((12, 10), [0, 2, 10, 0]),
    ),
)
def test_paddle_sizes(shape, lengths):
    """Paddle's test of sequence_reverse: packed rows with empty segments among them."""
    rng = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])

    def expected(x):
        return np.concatenate([np.flip(part, 0) for part in np.split(x, offsets[1:-1])])

    encodings = (
        dict(lengths=np.array(lengths)),
        dict(cu_seqlens=offsets),
        dict(segment_ids=np.repeat(np.arange(len(lengths)), lengths)),
    )
    dtypes = ("float32", "float64", "int8", "int32", "int64")
    with enable_x64():
        for i, dtype in enumerate(dtypes):
            encoding = jax.tree.map(jnp.asarray, encodings[i % 3])
            x, cotangent = (random_bits(rng, shape, dtype) for _ in range(2))
            ours = partial(reverse_segments, **encoding)
            assert_same_bits(ours(jnp.asarray(x)), expected(x), dtype)
            if jnp.issubdtype(dtype, jnp.floating):
                (got,) = jax.vjp(ours, x)[1](jnp.asarray(cotangent))
                assert_same_bits(got, expected(cotangent), dtype)


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


def test_tensors_of_other_frameworks_are_operands():
    """Fails if a tensor is refused, or aborts the process, as one of strings did."""
    need("torch", "tensorflow")
    import tensorflow as tf
    import torch

    x, lengths = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 3])
    expected = np.asarray(reverse_sequence(x, lengths))
    for tensor in (torch.tensor, tf.constant):
        assert_same_bits(reverse_sequence(tensor(x), tensor(lengths)), expected)
    with pytest.raises(TypeError, match="x has dtype torch.float32.*detach"):
        reverse_sequence(torch.tensor(x, requires_grad=True), lengths)
    with pytest.raises(TypeError, match="x has dtype .*string"):
        reverse_sequence(tf.constant(["a"]), 1)

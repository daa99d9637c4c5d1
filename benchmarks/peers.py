"""The same reversal in other frameworks, as far as they are installed and can do it.

Each function yields contenders, or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module  # A type checker need not find the frameworks.
from typing import Any

import numpy as np

from benchmarks.timing import Absent, Contender, device


def _repeat(call: Callable[[], Any], wait: Callable[[], Any] = lambda: None):
    def run(n: int) -> Any:
        for _ in range(n - 1):
            call()
        out = call()
        wait()
        return out

    return run


def _host_only() -> None:
    if device().platform != "cpu":
        raise Absent("timed on the CPU only")


def tensorflow(o: Any) -> Iterator[Contender]:
    _host_only()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = import_module("tensorflow")
    x, lengths = tf.constant(o.host), tf.constant(o.segments)

    def eager() -> Any:
        return tf.reverse_sequence(x, lengths, o.case.axis, o.case.batch_axes[0])

    compiled = tf.function(eager, jit_compile=True)
    yield Contender("TensorFlow", _repeat(eager), "pooled")
    yield Contender("TensorFlow XLA", _repeat(compiled), "pooled")


def onnx_runtime(o: Any) -> Iterator[Contender]:
    _host_only()
    onnxruntime, helper = import_module("onnxruntime"), import_module("onnx.helper")
    feed = {"x": o.host, "lengths": o.segments.astype(np.int64)}

    def info(name: str, array: np.ndarray) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, array.shape)

    axes = dict(time_axis=o.case.axis, batch_axis=o.case.batch_axes[0])
    node = helper.make_node("ReverseSequence", list(feed), ["y"], **axes)
    inputs, outputs = [info(*pair) for pair in feed.items()], [info("y", o.host)]
    graph = helper.make_graph([node], "reverse", inputs, outputs)
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Its threads would spin on in the turn of the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    run = _repeat(lambda: session.run(None, feed)[0])
    yield Contender("ONNX Runtime", run, "pooled")


def pytorch(o: Any) -> Iterator[Contender]:
    """`index_select` of whole rows, which is mostly faster than `gather`."""
    torch = import_module("torch")
    where = {"gpu": "cuda"}.get(device().platform, device().platform)
    if where != "cpu" and not (where == "cuda" and torch.cuda.is_available()):
        raise Absent("this build of PyTorch cannot use the device")
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    host = o.host if o.host.dtype.kind != "V" else o.host.view(np.int16)  # bfloat16
    x = torch.from_numpy(host).to(where)
    lengths = torch.from_numpy(o.segments.astype(np.int64)[:, None]).to(where)
    flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    t = torch.arange(o.case.size, device=x.device)
    n = torch.arange(len(lengths), device=x.device)[:, None]

    def call(**more: Any) -> Any:
        source = torch.where(t < lengths, lengths - 1 - t, t)
        time_major = o.case.axis == 0
        rows = (source * len(n) + n).T if time_major else n * len(t) + source
        return torch.index_select(flat, 0, rows.flatten(), **more).view(x.shape)

    yield Contender("PyTorch", _repeat(call, wait))
    yield Contender("PyTorch", _repeat(lambda: call(out=out), wait), "reused")


PEERS = {"TensorFlow": tensorflow, "ONNX Runtime": onnx_runtime, "PyTorch": pytorch}

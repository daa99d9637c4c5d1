"""The same job in other frameworks, as far as they are installed and can do it.

Each function yields contenders for one row, or raises: `Absent` where the framework has
no such operator, ImportError where it is not installed (which no type checker need
know).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.contenders import Absent, Operands, flax, take_along_axis
from benchmarks.timing import Contender


def _times(call: Callable[[], Any], wait: Callable[[], Any] | None = None):
    def run(n: int) -> Any:
        for _ in range(n - 1):
            call()
        out = call()
        if wait is not None:
            wait()
        return out

    return run


def _on_host(o: Operands, padded: bool = False) -> None:
    if o.device.platform != "cpu":
        raise Absent("on the CPU only")
    if padded and o.case.layout != "padded":
        raise Absent("one segment a row only")


def tensorflow(o: Operands) -> Iterator[Contender]:
    _on_host(o, padded=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # It talks while it is loaded.
    tf = import_module("tensorflow")

    x, lengths = tf.constant(o.host), tf.constant(o.segments)
    axes = dict(seq_axis=o.case.axis, batch_axis=o.case.batch_axes[0])
    compiled = tf.function(
        lambda x, lengths: tf.reverse_sequence(x, lengths, **axes), jit_compile=True
    )
    eager = _times(lambda: tf.reverse_sequence(x, lengths, **axes))
    yield Contender("TensorFlow", eager, "pooled")
    yield Contender("TensorFlow XLA", _times(lambda: compiled(x, lengths)), "pooled")


def onnx_runtime(o: Operands) -> Iterator[Contender]:
    _on_host(o, padded=True)
    onnxruntime, helper = import_module("onnxruntime"), import_module("onnx.helper")

    int64, kind = map(
        helper.np_dtype_to_tensor_dtype, (np.dtype(np.int64), o.host.dtype)
    )
    node = helper.make_node(
        "ReverseSequence",
        ["x", "lengths"],
        ["y"],
        time_axis=o.case.axis,
        batch_axis=o.case.batch_axes[0],
    )
    graph = helper.make_graph(
        [node],
        "reverse",
        [
            helper.make_tensor_value_info("x", kind, o.host.shape),
            helper.make_tensor_value_info(
                "lengths",
                int64,
                o.segments.shape,
            ),
        ],
        [helper.make_tensor_value_info("y", kind, o.host.shape)],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # What it cannot do it raises, too.
    # Its threads would go on spinning in the turn of the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": o.host, "lengths": o.segments.astype(np.int64)}
    yield Contender(
        "ONNX Runtime", _times(lambda: session.run(None, feed)[0]), "pooled"
    )
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy
    out = to_value(np.zeros_like(o.host))
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, to_value(value))
    binding.bind_ortvalue_output("y", out)

    def reused(n: int) -> np.ndarray | None:
        for _ in range(n):
            session.run_with_iobinding(binding)
        return out.numpy() if n == 1 else None  # A copy of it.

    yield Contender("ONNX Runtime", reused, "reused")


def _torch_index(torch: Any, segments: Any, o: Operands) -> Any:
    """As `pasted_index`."""
    size = o.case.size
    t = torch.arange(size, device=segments.device)
    if o.case.layout == "padded":
        n = segments[:, None]
        return torch.where(t < n, n - 1 - t, t)
    if o.case.layout == "packed":
        ends = segments.cumsum(1)
        rows = t.expand(len(ends), -1).contiguous()
        k = torch.searchsorted(ends, rows, right=True)
        inside, k = k < ends.shape[1], k.clamp(max=ends.shape[1] - 1)
        end = ends.gather(1, k)
        start = end - segments.gather(1, k)
        return torch.where(inside, start + end - 1 - t, t)
    changes = segments[:, 1:] != segments[:, :-1]
    edge = torch.ones_like(changes[:, :1])
    starts, ends = torch.cat([edge, changes], 1), torch.cat([changes, edge], 1)
    start = torch.where(starts, t, 0).cummax(1).values
    end = torch.where(ends, t, size - 1).flip(1).cummin(1).values.flip(1)
    if o.case.padding_id is None:
        return start + end - t
    return torch.where(segments != o.case.padding_id, start + end - t, t)


def pytorch(o: Operands) -> Iterator[Contender]:
    torch = import_module("torch")

    platform = {"gpu": "cuda"}.get(o.device.platform, o.device.platform)
    if platform == "cuda" and not torch.cuda.is_available():
        raise Absent("a build of PyTorch without CUDA")
    host = o.host if o.host.dtype.kind != "V" else o.host.view(np.int16)  # bfloat16
    x = torch.from_numpy(host).to(platform)
    segments = torch.from_numpy(o.segments.astype(np.int64)).to(platform)
    wait = torch.cuda.synchronize if platform == "cuda" else None
    axis, out = o.case.axis, torch.zeros_like(x)

    def index() -> Any:
        source = _torch_index(torch, segments, o)
        return source.T if axis == 0 else source

    def gather(**more: Any) -> Any:
        expanded = index().reshape(*x.shape[:2], *[1] * (x.ndim - 2)).expand(x.shape)
        return torch.gather(x, axis, expanded, **more)

    def rows(**more: Any) -> Any:
        """Rows of the array flattened to (N * T, ...)."""
        source = _torch_index(torch, segments, o)
        n = torch.arange(len(source), device=x.device)[:, None]
        flat = (source * len(n) + n).T if axis == 0 else n * x.shape[1] + source
        more = {name: value.flatten(0, 1) for name, value in more.items()}
        return torch.index_select(x.flatten(0, 1), 0, flat.flatten(), **more).view(
            x.shape
        )

    def to_numpy(run: Callable[[int], Any]) -> Callable[[int], Any]:
        return lambda n: run(n).cpu() if n == 1 else run(n)

    for name, call in (("PyTorch gather", gather), ("PyTorch index_select", rows)):

        def into(call=call) -> Any:
            call(out=out)
            return out

        yield Contender(name, to_numpy(_times(call, wait)), "fresh")
        yield Contender(name, to_numpy(_times(into, wait)), "reused")


def numpy(o: Operands) -> Iterator[Contender]:
    """A loop over the segments, each reversed by slices; padding copied."""
    _on_host(o)
    x = np.moveaxis(o.host, o.case.axis, 1)
    out = np.zeros_like(o.host)
    target = np.moveaxis(out, o.case.axis, 1)

    def bounds(row: np.ndarray) -> Any:
        if o.case.layout == "ids":
            ends = np.flatnonzero(np.diff(row, append=row[-1] + 1)) + 1
            starts = np.concatenate([[0], ends[:-1]])
            keep = slice(None)
            if o.case.padding_id is not None:
                keep = row[starts] != o.case.padding_id
            return zip(starts[keep], ends[keep], strict=True)
        ends = np.atleast_1d(row).cumsum()
        return zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)

    def call() -> np.ndarray:
        for n, row in enumerate(o.segments):
            last = 0
            for start, end in bounds(row):
                target[n, last:start] = x[n, last:start]
                target[n, start:end] = x[n, start:end][::-1]
                last = end
            target[n, last:] = x[n, last:]
        return out

    yield Contender("NumPy loop", _times(call))


PEERS = {
    "take_along_axis": take_along_axis,
    "Flax": flax,
    "TensorFlow": tensorflow,
    "ONNX Runtime": onnx_runtime,
    "PyTorch": pytorch,
    "NumPy": numpy,
}

"""Exported models, in ONNX Runtime, beside the functions that they come from."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import (
    associative_scan_segments,
    bidirectional,
    bidirectional_scan,
    pack_segments,
    reverse_segment_order,
    reverse_segments,
    reverse_sequence,
    scan_segments,
    unpack_segments,
)

pytestmark = pytest.mark.peers
X = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
SIGNED = np.where(X % 2 == 0, -0.0, X).astype(np.float32)
# Several lengths through one model; the last ones are clipped.
LENGTHS = np.array([[3, 5], [0, 1], [4, 2], [-1, 7], [-(2**31), 2**31 - 1]], np.int32)


def export(f, *examples):
    """Returns the operators of the exported graph, and a function that runs it."""
    jax2onnx = pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    import jax_revseg.onnx  # noqa: F401

    specs = [jax.ShapeDtypeStruct(e.shape, e.dtype) for e in examples]
    model = jax2onnx.to_onnx(f, specs)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [i.name for i in session.get_inputs()]

    def run(*inputs):
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return [node.op_type for node in model.graph.node], run


def compare(f, run, arrays, exact=False):
    ours = jax.tree.leaves(f(*map(jnp.asarray, arrays)))
    for a, b in zip(ours, run(*arrays), strict=True):
        a = np.asarray(a)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if exact:
            assert a.tobytes() == b.tobytes()
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def check(f, *inputs, others=(), exact=True):
    """Compares f with its exported model; returns the operators of the graph."""
    operators, run = export(f, *inputs)
    for arrays in [inputs, *others]:
        compare(f, run, arrays, exact)
    return operators


@pytest.mark.parametrize("dtype", ["f4", "i4", "i1", "u1", "f2", "?"])
def test_one_length_a_row_is_one_node(dtype):
    """A gather in place of the node, or lengths that ONNX Runtime refuses."""
    x = X.astype(dtype)
    others = [(x, lengths) for lengths in LENGTHS]
    operators = check(reverse_sequence, x, LENGTHS[0], others=others)
    assert operators.count("ReverseSequence") == 1
    assert not {"Transpose", "GatherND", "Gather", "Loop"} & {*operators}


@pytest.mark.parametrize(
    ("shape", "axis", "batch_axis"),
    [
        ((5, 2, 3), 0, 1),
        ((5, 2), 0, 1),
        ((3, 2, 5), 2, 1),
        ((2, 3, 5, 2), 2, (0, 1)),
        ((5, 3, 2, 2), 0, (2, 1)),
        ((5, 3), 0, ()),
    ],
)
def test_axes(shape, axis, batch_axis):
    """An axis order that the node does not have."""
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    batch = [shape[a] for a in np.atleast_1d(np.array(batch_axis, int))]
    rng = np.random.default_rng(0)
    lengths = [np.array(rng.integers(-1, 8, batch), np.int32) for _ in range(4)]

    def f(x, n):
        return reverse_sequence(x, n, axis=axis, batch_axis=batch_axis)

    operators = check(f, x, lengths[0], others=[(x, n) for n in lengths])
    assert operators.count("ReverseSequence") == 1


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty(shape):
    """ONNX Runtime refuses some empty arrays. A sum with zero turns -0.0 into 0.0."""
    check(reverse_sequence, np.zeros(shape, np.float32), np.zeros(shape[0], np.int32))
    check(reverse_segments, SIGNED, np.zeros((2, 0), np.int32))


PACKED = np.array([[2, 0, 3], [5, 0, 0], [1, 1, 1], [-4, 3, 9], [0, 0, 0]], np.int32)
IDS = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [0, 1, 2, 3, 4], [2] * 5], np.int32)


@pytest.mark.parametrize("name", ["lengths", "segment_ids", "padding_id"])
@pytest.mark.parametrize("batched", [False, True])
def test_several_segments(batched, name):
    """An index that is wrong beside empty segments, the tail, an id that comes again,
    or in another row; or padding that moves."""
    all_rows = PACKED if name == "lengths" else IDS
    pairs = [np.stack([a, b]) for a in all_rows for b in all_rows[:2]]
    x, segments = (X, pairs) if batched else (X[0], list(all_rows))

    def f(x, n):
        if name == "lengths":
            return reverse_segments(x, n)
        padding_id = 1 if name == "padding_id" else None
        return reverse_segments(x, segment_ids=n, padding_id=padding_id)

    check(f, x, segments[0], others=[(x, s) for s in segments])


@pytest.mark.parametrize("max_length", [1, 3, 6])
def test_packing(max_length):
    """Rows that are cut off, lengths past the end, and a tail."""
    pack = lambda x, n: pack_segments(x, n, max_length=max_length)  # noqa: E731
    unpack = lambda x, n: unpack_segments(x, n, total_length=5)  # noqa: E731
    fill = lambda x, n: pack_segments(x, n, max_length=max_length, padding_value=7)  # noqa: E731

    def gradient(ct, n):
        return jax.linear_transpose(lambda x: pack(x, n), jnp.zeros((5, 2)))(ct)

    pairs = [np.stack([a, b]) for a in PACKED for b in PACKED[:2]]
    rows = np.arange(3 * max_length * 2, dtype=np.float32).reshape(3, max_length, 2)
    for f, x, lengths in (
        (pack, SIGNED[0], PACKED),
        (fill, X[0], PACKED),
        (unpack, rows, PACKED),
        (gradient, rows, PACKED),
        (jax.vmap(pack), X, pairs),
        (jax.vmap(unpack), np.stack([rows, -rows]), pairs),
    ):
        check(f, x, lengths[0], others=[(x, n) for n in lengths])


def rnn_step(params, carry, x):
    carry = jnp.tanh(carry @ params + x)
    return carry, carry


W = np.linspace(-0.5, 0.5, 9, dtype=np.float32).reshape(3, 3)


def rnn_layer(w, x):
    """A layer of shape (N, T, 3)."""
    xs = jax.lax.transpose(x, (1, 0, 2))
    init = jnp.zeros((x.shape[0], 3))
    ys = jax.lax.scan(partial(rnn_step, w), init, xs)[1]
    return jax.lax.transpose(ys, (1, 0, 2))


def scan(x, *args, **kwargs):
    init = jnp.zeros((x.shape[0], 3))
    return scan_segments(partial(rnn_step, W), init, x, *args, **kwargs)


def both(x, *args, **kwargs):
    params, zeros = (jnp.asarray(W), jnp.asarray(W.T)), jnp.zeros((x.shape[0], 3))
    return bidirectional_scan(rnn_step, params, (zeros, zeros), x, *args, **kwargs)


def two_layers(x, *args, **kwargs):
    layers = partial(rnn_layer, W), partial(rnn_layer, W.T)
    return bidirectional(*layers, x, *args, **kwargs)


BOTH = np.stack([PACKED[0], PACKED[2]])
OFFSETS = np.array([[0, 2, 2, 5], [0, 1, 3, 4]], np.int32)
FLAGS = np.array([[0, 0, 1, 0, 1], [1, 1, 0, 1, 0]], bool)
# The name of each call, its function of x and one encoding, and encodings.
ENCODINGS = {
    "lengths": list(LENGTHS),
    "packed": [BOTH, BOTH[::-1]],
    "segment_ids": [IDS[:2], IDS[2:]],
    "cu_seqlens": [OFFSETS, OFFSETS[::-1]],
    "starts": [FLAGS, ~FLAGS],
    "mask": [FLAGS, ~FLAGS],
}
EVERY = ("lengths", "segment_ids", "starts", "mask", "cu_seqlens")
PACKED_ONLY = ("packed", "segment_ids", "starts", "cu_seqlens")
VALUE, CARRY = {"padding_value": 7}, {"carry_in": np.ones((2, 3), np.float32)}
CALLS = [
    (reverse_sequence, "lengths", VALUE),
    *((reverse_segments, e, more) for e in PACKED_ONLY for more in ({}, VALUE)),
    (reverse_segment_order, "packed", {}),
    *((f, e, {}) for f in (scan, both) for e in EVERY),
    *((two_layers, e, {}) for e in EVERY[:4]),
    *((scan, e, {"chunk": 2}) for e in ("lengths", "starts")),
    (scan, "starts", CARRY),
]


@pytest.mark.parametrize(
    ("f", "encoding", "options"),
    CALLS,
    ids=[f"{f.__name__}-{e}-{'-'.join(o)}" for f, e, o in CALLS],
)
def test_every_call(f, encoding, options):
    """An operator that ONNX Runtime lacks, or a wrong value; and after the export
    jax2onnx's primitives in a program that is kept."""
    if encoding == "segment_ids":
        options = {**options, "padding_id": 0}

    def call(x, segments):
        if encoding in ("lengths", "packed"):
            return f(x, segments, **options)
        return f(x, **{encoding: segments}, **options)

    first, *others = [(X / 30, segments) for segments in ENCODINGS[encoding]]
    check(call, *first, others=others, exact=False)
    after = lambda *arrays: jax.tree.leaves(jax.jit(call)(*arrays))  # noqa: E731
    compare(call, after, first)


@pytest.mark.parametrize(
    ("f", "encoding"),
    [(f, "lengths") for f in (reverse_sequence, scan, both, two_layers)]
    + [(scan, encoding) for encoding in ("mask", "starts")],
)
def test_symbolic_batch(f, encoding):
    """A call that needs one model for each batch size."""

    def call(x, segments):
        return f(x, **{encoding: segments})

    first, second = ENCODINGS[encoding][:2]
    specs = [jax.ShapeDtypeStruct(("B", *a.shape[1:]), a.dtype) for a in (X, first)]
    model, run = export(call, *specs)
    wide = np.concatenate([X, -X]) / 30, np.concatenate([first, second])
    for arrays in (X / 30, first), wide:
        compare(call, run, arrays)


@pytest.mark.filterwarnings("ignore:'.value' access:DeprecationWarning")  # jax2onnx's.
def test_two_nnx_layers():
    """A model of Flax NNX in which a reversal is not one node."""
    nnx = pytest.importorskip("flax.nnx")
    rngs, zeros = nnx.Rngs(0), jnp.zeros((2, 4))

    def layer(features):
        return [nnx.RNN(nnx.GRUCell(features, 4, rngs=rngs)) for _ in range(2)]

    model = nnx.split(nnx.List([nnx.List(layer(3)), nnx.List(layer(8))]))

    def f(x, n):
        # New variables, because NNX refuses to scan with those made outside a trace.
        graph, state = jax.tree.map(jnp.asarray, model)
        for layers in nnx.merge(graph, state):
            run = [partial(layer, initial_carry=zeros) for layer in layers]
            x = bidirectional(*run, x, n)
        return x

    others = [(X / 30, n) for n in LENGTHS]
    operators = check(f, X / 30, LENGTHS[0], others=others, exact=False)
    assert operators.count("ReverseSequence") == 4


def test_dtype_without_a_node():
    """ReverseSequence takes no bfloat16, and a gather does."""

    def f(x, n):
        return reverse_sequence(x.astype(jnp.bfloat16), n).astype(jnp.float32)

    operators = check(f, X, LENGTHS[0], others=[(X, n) for n in LENGTHS])
    assert "ReverseSequence" not in operators


def test_symbolic_sizes():
    """An error that does not name the shapes."""
    jax2onnx = pytest.importorskip("jax2onnx")
    import jax_revseg.onnx  # noqa: F401

    f = lambda x: reverse_sequence(x, jnp.array([3, 5]))  # noqa: E731
    with pytest.raises(NotImplementedError, match="needs shapes of integers"):
        jax2onnx.to_onnx(f, [(2, "T", 3)])
    jax.clear_caches()


def test_what_jax2onnx_cannot_export():
    """A page that says no to what has become possible."""
    add, zeros = (lambda carry, x: (carry + x, carry)), jnp.zeros((5, 3))
    lax_scan = lambda x: jax.lax.scan(add, zeros, x, reverse=True)[1]  # noqa: E731
    reverse = lambda x: scan(x, LENGTHS[0], reverse=True)  # noqa: E731
    lax_associative = partial(jax.lax.associative_scan, jnp.add)
    associative = partial(associative_scan_segments, jnp.add, lengths=LENGTHS[0])
    for f in (lax_scan, reverse, lax_associative, associative):
        with pytest.raises(NotImplementedError):
            export(f, X)


def test_without_jax2onnx(monkeypatch):
    """An error that does not say what to install."""
    monkeypatch.delitem(sys.modules, "jax_revseg.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "jax2onnx.plugins.plugin_system", None)
    with pytest.raises(ImportError, match=r"needs jax2onnx .*\[onnx\]"):
        import jax_revseg.onnx  # noqa: F401

"""Gradients with a mesh that is set, unset, or changed between calls.

A transpose rule that reshards where the target has no explicit axes raises here.
"""

import contextlib
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

N, T = 4, 6
X = np.arange(N * T, dtype=np.float32).reshape(N, T) / 7
LENGTHS = np.array([6, 0, 3, 4], np.int32)
PACKED = np.array([[2, 3], [6, 0], [0, 1], [4, 2]], np.int32)
IDS = np.array([[1, 1, 2, 2, 2, 0]] * N, np.int32)


def step(w, carry, x):
    carry = jnp.tanh(w * carry + x)
    return carry, carry


def cumsums(x):
    return jnp.cumsum(x, 1)[..., None]


def zeros(x):
    return jnp.zeros(x.shape[0])


FUNCTIONS = {
    "lengths": lambda x, n, k, ids: reverse_sequence(x, n),
    "padding_value": lambda x, n, k, ids: reverse_sequence(x, n, padding_value=2),
    "packed": lambda x, n, k, ids: reverse_segments(x, k),
    "ids": lambda x, n, k, ids: reverse_segments(x, segment_ids=ids, padding_id=0),
    "order": lambda x, n, k, ids: reverse_segment_order(x, k)[0],
    "bidirectional": lambda x, n, k, ids: bidirectional(cumsums, cumsums)(x, n),
    "scan": lambda x, n, k, ids: scan_segments(partial(step, 2.0), zeros(x), x, n)[1],
    "both": lambda x, n, k, ids: bidirectional_scan(
        step, (2.0, 3.0), (zeros(x), zeros(x)), x, n
    )[1][1],
    "associative": lambda x, n, k, ids: associative_scan_segments(
        jnp.add, x, segment_ids=ids, padding_id=0
    )[:, :5],
}
PACKING = {
    "pack": lambda x, n, k, ids: pack_segments(x[0], k[0], max_length=4),
    "unpack": lambda x, n, k, ids: unpack_segments(x, n, total_length=15),
}
each_kind = pytest.mark.parametrize("kind", ("Auto", "Explicit"))


def derivatives(x, segments, functions, jacobian=True):
    """A value, a gradient, a Hessian-vector product and a Jacobian of each function."""
    out = {}
    for name, f in functions.items():

        def loss(x, f=f):
            y = f(x, *segments)
            return jnp.sum(y**2 * jnp.cos(jnp.arange(y.size * 1.0)).reshape(y.shape))

        (value, grad), (_, hvp) = jax.jvp(jax.value_and_grad(loss), (x,), (x,))
        out[name] = value, grad, hvp
        if jacobian:
            out[name] += (jax.jacrev(loss)(x),)
    return out


def close(actual, desired):
    actual, desired = jax.device_get((actual, desired))
    for name, values in desired.items():
        for a, b in zip(actual[name], values, strict=False):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def desired():
    run = jax.jit(partial(derivatives, functions=FUNCTIONS | PACKING))
    return jax.device_get(run(X, (LENGTHS, PACKED, IDS)))


def make(kind, devices=1):
    kind = getattr(jax.sharding.AxisType, kind)
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,))


@each_kind
@pytest.mark.parametrize("where", ("host", "device eagerly", "mesh"))
def test_derivatives_with_a_mesh_of_one_device(kind, where, desired):
    functions, jit = FUNCTIONS | PACKING, "eagerly" not in where
    if not jit:  # Each operation is compiled alone: fewer functions are enough.
        functions = {k: functions[k] for k in ("padding_value", "order", "pack")}
    mesh = make(kind)
    operands = X, (LENGTHS, PACKED, IDS)
    if not jit:
        operands = jax.tree.map(jnp.asarray, operands)
    elif where == "mesh":
        operands = jax.device_put(operands, jax.NamedSharding(mesh, jax.P()))
    run = partial(derivatives, functions=functions)
    with jax.set_mesh(mesh):
        actual = (jax.jit(run) if jit else run)(*operands)
    close(actual, {k: desired[k] for k in functions})


@each_kind
@pytest.mark.parametrize(
    "what, context",
    (("x", "set"), ("segments", "set"), ("both", "unset")),
)
def test_derivatives_with_sharded_rows(kind, what, context, desired):
    mesh = make(kind, 4)
    rows = jax.NamedSharding(mesh, jax.P("d"))
    x, segments = X, (LENGTHS, PACKED, IDS)
    if what != "segments":
        x = jax.device_put(x, rows)
    if what != "x":
        segments = jax.device_put(segments, rows)
    # `jacrev` of any function of an unsharded x fails if its output is sharded.
    jacobian = what != "segments" or kind == "Auto"
    run = partial(derivatives, functions=FUNCTIONS, jacobian=jacobian)
    with jax.set_mesh(mesh) if context == "set" else contextlib.nullcontext():
        actual = jax.jit(run)(x, segments)
    close(actual, {k: desired[k] for k in FUNCTIONS})


def test_shardings_changed_between_eager_calls():
    """JAX caches parts of a gradient by type: one of them may belong to a mesh."""
    mesh = make("Auto", 4)
    sharded = jax.device_put(X, jax.NamedSharding(mesh, jax.P("d")))
    weights = np.cos(X)
    double = jax.shard_map(
        lambda x: 2 * x, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d")
    )
    for f in (
        lambda x: reverse_sequence(x, jnp.asarray(LENGTHS)),
        lambda x: reverse_segments(x, segment_ids=jnp.asarray(IDS), padding_id=0),
    ):
        grad = jax.grad(lambda x, f=f: (f(x) * weights).sum())
        expected = f(weights)
        for x in (sharded, X, jnp.asarray(X), sharded):
            np.testing.assert_array_equal(grad(x), expected)
        jax.grad(lambda x: double(x).sum())(X)
        np.testing.assert_array_equal(grad(jnp.asarray(X)), expected)


@each_kind
def test_cotangents_sharded_otherwise(kind):
    mesh = make(kind, 4)
    lengths = jnp.asarray(LENGTHS)
    expected = reverse_sequence(X, lengths)
    sharded = jax.device_put(X, jax.NamedSharding(mesh, jax.P("d")))
    _, vjp = jax.vjp(lambda x: reverse_sequence(x, lengths), jnp.asarray(X))
    if kind == "Auto":
        np.testing.assert_array_equal(vjp(sharded)[0], expected)
    transposed = jax.linear_transpose(lambda x: reverse_sequence(x, lengths), sharded)
    np.testing.assert_array_equal(transposed(sharded)[0], expected)


def test_packing_keeps_the_sharding_of_features():
    mesh = make("Explicit", 2)
    features = jax.NamedSharding(mesh, jax.P(None, "d"))
    lengths = jnp.array([3, 2])
    pack = jax.jit(partial(pack_segments, max_length=3))
    unpack = jax.jit(partial(unpack_segments, total_length=6))

    def grad(x):
        return jax.grad(lambda x: (pack(x, lengths) ** 2).sum())(x)

    def specs(x):
        rows = pack(x, lengths)
        types = map(jax.typeof, (rows, unpack(rows, lengths), grad(x)))
        found.append([t.sharding.spec for t in types])

    found = []
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((6, 4), np.float32), features)
        desired = (np.arange(6) < 5)[:, None] * np.ones(4)
        np.testing.assert_array_equal(unpack(pack(x, lengths), lengths), desired)
        np.testing.assert_array_equal(jax.jit(grad)(x), 2 * desired)
        # JAX before 0.12 cannot run any program on an empty array with this sharding.
        for array in (x, jax.device_put(x[:0], features)):
            jax.eval_shape(specs, array)
    assert found == [[jax.P(None, None, "d"), jax.P(None, "d"), jax.P(None, "d")]] * 2


def test_packing_refuses_sharded_rows_and_steps():
    mesh = make("Explicit", 2)
    rows = jax.NamedSharding(mesh, jax.P("d"))
    x, lengths = jnp.ones((6, 4)), jnp.array([2, 2])
    with jax.set_mesh(mesh):
        with pytest.raises(
            ValueError, match="pack_segments: axis 0 of x .* 'd'.*reshard"
        ):
            pack_segments(jax.device_put(x, rows), lengths, max_length=3)
        with pytest.raises(ValueError, match="axis 0 of the lengths .* 'd'.*reshard"):
            pack_segments(x, jax.device_put(lengths, rows), max_length=3)
        with pytest.raises(ValueError, match="unpack_segments: axis 0 of x .* 'd'"):
            blocks = jax.device_put(jnp.ones((2, 6, 4)), rows)
            unpack_segments(blocks, lengths, total_length=3)

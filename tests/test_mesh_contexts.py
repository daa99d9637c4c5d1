"""Gradients with a mesh that is set, unset, or changed between calls.

A transpose rule that reshards where the target has no explicit axes raises here.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import pack_segments, reverse_sequence, unpack_segments
from tests.functions import FUNCTIONS, SCANS, operands, values
from tests.meshes import make_mesh
from tests.ragged import weighted

X, OTHERS = operands()
X /= 7
# Each kind of rule once: compilation takes the time. test_scan.py shards all scans.
ROWS = ("lengths value", "ids", "order", "scan ids")
WHOLE = ("associative", "pack", "unpack")  # What needs no mesh of several devices.
EAGER = ("lengths value", "pack")


def loss_of(name, others):
    """A scalar of all values of a function, in which each counts differently."""
    return lambda x: weighted([y**2 for y in values(FUNCTIONS[name], x, others)])


def derivatives(x, others, names):
    """A value, a gradient, and of what is no scan a Hessian-vector product."""
    runs = {name: jax.value_and_grad(loss_of(name, others)) for name in names}
    return {
        name: jax.tree.leaves(run(x) if name in SCANS else jax.jvp(run, (x,), (x,)))
        for name, run in runs.items()
    }


def close(actual, desired):
    for name, arrays in jax.device_get(actual).items():
        for a, b in zip(arrays, desired[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def desired():
    run = jax.jit(partial(derivatives, names=ROWS + WHOLE))
    return jax.device_get(run(X, OTHERS))


each_kind = pytest.mark.parametrize("kind", ("Auto", "Explicit"))


@each_kind
def test_derivatives_with_a_mesh_of_one_device(kind, desired):
    """Fails on a reshard that JAX refuses there."""
    mesh = make_mesh(kind, d=1)
    x, others = jax.device_put((X, OTHERS), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        close(jax.jit(partial(derivatives, names=WHOLE))(x, others), desired)
        # Outside jit each operation is compiled alone: few are enough.
        x, others = jax.tree.map(jnp.asarray, (X, OTHERS))
        for name in EAGER:
            grad = jax.grad(loss_of(name, others))(x)
            close({name: [grad]}, {name: desired[name][1:2]})


@pytest.mark.parametrize(
    "kind, what, context",
    (
        ("Auto", "x", "set"),
        ("Explicit", "x", "set"),
        ("Explicit", "others", "set"),
        ("Explicit", "both", "unset"),
    ),
)
def test_derivatives_with_sharded_rows(kind, what, context, desired):
    """Fails on a gradient with the sharding of the result where x has another."""
    mesh = make_mesh(kind, d=4)

    def shard(array):
        spec = jax.P("d") if array.ndim else jax.P()
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    x, others = X, OTHERS
    if what != "others":
        x = shard(x)
    if what != "x":
        others = jax.tree.map(shard, others)
    with jax.set_mesh(mesh) if context == "set" else contextlib.nullcontext():
        close(jax.jit(partial(derivatives, names=ROWS))(x, others), desired)


def test_shardings_changed_between_eager_calls():
    """JAX caches parts of a gradient by type: one of them may belong to a mesh."""
    mesh = make_mesh("Auto", d=4)
    sharded = jax.device_put(X, jax.NamedSharding(mesh, jax.P("d")))
    weights = np.cos(X)
    double = jax.shard_map(
        lambda x: 2 * x, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d")
    )
    f = partial(FUNCTIONS["lengths"], o=jax.tree.map(jnp.asarray, OTHERS))
    grad, expected = jax.grad(lambda x: (f(x) * weights).sum()), f(weights)
    for x in (sharded, X, jnp.asarray(X), sharded):
        np.testing.assert_array_equal(grad(x), expected)
    jax.grad(lambda x: double(x).sum())(X)
    np.testing.assert_array_equal(grad(jnp.asarray(X)), expected)


@each_kind
def test_cotangents_sharded_otherwise(kind):
    mesh = make_mesh(kind, d=4)
    lengths = jnp.asarray(OTHERS["n"])
    expected = reverse_sequence(X, lengths)
    sharded = jax.device_put(X, jax.NamedSharding(mesh, jax.P("d")))
    _, vjp = jax.vjp(lambda x: reverse_sequence(x, lengths), jnp.asarray(X))
    if kind == "Auto":
        np.testing.assert_array_equal(vjp(sharded)[0], expected)
    transposed = jax.linear_transpose(lambda x: reverse_sequence(x, lengths), sharded)
    np.testing.assert_array_equal(transposed(sharded)[0], expected)


def test_packing_keeps_the_sharding_of_features():
    """Fails if a result or a gradient is replicated, also of an empty array."""
    mesh, lengths = make_mesh("Explicit", d=2), jnp.array([3, 2])
    features = jax.NamedSharding(mesh, jax.P(None, "d"))

    @jax.jit
    def run(x):
        rows = pack_segments(x, lengths, max_length=3)
        return rows, unpack_segments(rows, lengths, total_length=6)

    def grad(x):
        return jax.grad(lambda x: (run(x)[0] ** 2).sum())(x)

    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((6, 4), np.float32), features)
        desired = (np.arange(6) < 5)[:, None] * np.ones(4)
        np.testing.assert_array_equal(run(x)[1], desired)
        np.testing.assert_array_equal(jax.jit(grad)(x), 2 * desired)
        # JAX before 0.12 cannot run any program on an empty array with this sharding.
        for array in (x, jax.device_put(x[:0], features)):
            types = *jax.eval_shape(run, array), jax.eval_shape(grad, array)
            specs = [tuple(t.sharding.spec) for t in types]
            assert specs == [(None, None, "d"), (None, "d"), (None, "d")]


def test_packing_refuses_sharded_rows_and_steps():
    mesh = make_mesh("Explicit", d=2)
    rows = jax.NamedSharding(mesh, jax.P("d"))
    x, lengths = jnp.ones((6, 4)), jnp.array([2, 2])
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="^pack_segments: axis 0 of x .*'d'.*resh"):
            pack_segments(jax.device_put(x, rows), lengths, max_length=3)
        with pytest.raises(ValueError, match="axis 0 of the lengths .* 'd'.*reshard"):
            pack_segments(x, jax.device_put(lengths, rows), max_length=3)
        with pytest.raises(ValueError, match="unpack_segments: axis 0 of x .* 'd'"):
            blocks = jax.device_put(jnp.ones((2, 6, 4)), rows)
            unpack_segments(blocks, lengths, total_length=3)

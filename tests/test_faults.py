"""Faults that were found once, each held by the smallest call that showed it."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

from jax_revseg import (
    associative_scan_segments,
    bidirectional,
    pack_segments,
    reverse_segment_order,
    reverse_segments,
    reverse_sequence,
    scan_segments,
    unpack_segments,
)

X = np.arange(32, dtype=np.float32).reshape(4, 8)
LENGTHS = np.array([3, 8, 0, 1])
ZEROS = jnp.zeros(4)


def test_checks_of_indices_and_floats_find_nothing():
    def run(x, n):
        rows = pack_segments(x[0], n, max_length=4)
        return (
            unpack_segments(rows, n, total_length=9),
            reverse_sequence(x, n, padding_value=0),
            reverse_segment_order(x, n[:, None]),
            scan_segments(lambda c, x: (c + x, c), ZEROS, x, n),
            associative_scan_segments(jnp.add, x, n),
        )

    def loss(x, n):
        return sum(leaf.sum() for leaf in jax.tree.leaves(run(x, n)))

    few = jnp.array([3, 2, 0, 1])
    check = checkify.checkify(jax.value_and_grad(loss), errors=checkify.all_checks)
    error, _ = jax.jit(check)(X, few)
    assert error.get() is None


@pytest.mark.parametrize(
    "value, dtype",
    (
        (np.array(2**40), np.int32),
        (np.array(2**31), np.int32),
        (-1, np.uint8),
        (2, bool),
        (2.5, np.int8),
        (np.nan, np.int32),
        (np.array(1e300), np.float32),
        (1e300, np.complex64),
        (10**400, np.complex64),
        (1j, np.float32),
        (np.nan, ml_dtypes.float4_e2m1fn),
        (np.inf, ml_dtypes.float8_e4m3fn),
        (0, ml_dtypes.float8_e8m0fnu),
        (8, ml_dtypes.int4),
        (np.ma.masked, np.float32),
    ),
    ids=str,
)
def test_padding_values_that_do_not_fit_raise(value, dtype):
    x = np.ones((2, 4)).astype(dtype)
    for call in (
        lambda: reverse_sequence(x, [1, 2], padding_value=value),
        lambda: pack_segments(x, [1, 1], max_length=2, padding_value=value),
    ):
        with pytest.raises(TypeError, match="padding_value"):
            call()


def test_padding_values_that_fit_are_cast():
    for value, dtype in (
        (0.0, np.int32),
        (np.uint64(2**31 - 1), np.int32),
        (np.nan, np.float16),
        (True, np.float32),
        (7, ml_dtypes.int4),
        (0.1, ml_dtypes.bfloat16),
    ):
        out = reverse_sequence(np.ones(2).astype(dtype), 1, padding_value=value)
        desired = np.asarray(value).astype(dtype)
        assert out.dtype == dtype and np.asarray(out)[1].tobytes() == desired.tobytes()


@pytest.mark.parametrize(
    "call, message",
    (
        (
            lambda: reverse_sequence(X, LENGTHS, implementation=["xla"]),
            "implementation",
        ),
        (lambda: reverse_sequence(X, LENGTHS, axis_name=0), "axis_name is 0"),
        (lambda: reverse_sequence(X, LENGTHS, axis_name=()), r"axis_name is \(\)"),
        (lambda: reverse_sequence(X, LENGTHS, axis_name=["d"]), "axis_name is"),
        (lambda: reverse_sequence(X, LENGTHS, axis_name=("d", "d")), "each once"),
        (
            lambda: bidirectional(lambda x: {"a": x}, lambda x: (x,))(
                X[..., None], LENGTHS
            ),
            "structure",
        ),
        (
            lambda: reverse_sequence(X, np.ma.masked_array(LENGTHS, mask=LENGTHS > 1)),
            "masked",
        ),
        (lambda: reverse_segments(jnp.ones((4, 9)), jnp.asarray(LENGTHS)), "axis=0"),
        (
            lambda: reverse_segments(X, cu_seqlens=jnp.array([0, 1, 2, 3, 4])),
            "axis=0",
        ),
        (
            lambda: scan_segments(lambda c, x: (c, x), ZEROS, X, LENGTHS[:3]),
            "^(?!.*batch_axis).*4.*3",
        ),
    ),
)
def test_messages_say_what_came(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_empty_arrays_vary_over_devices():
    """Fails if `out_specs=P()` accepts a result of which each device has another."""
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    n = jnp.ones(4, int)
    for f, x in (
        (partial(reverse_sequence, padding_value=1.0), jnp.ones((4, 0))),
        (lambda x, n: pack_segments(x[:0], n, max_length=2), jnp.ones((4, 2))),
        (lambda x, n: unpack_segments(x[:, :0], n, total_length=2), jnp.ones((4, 2))),
        (lambda x, n: unpack_segments(x[:0], n[:0], total_length=2), jnp.ones((4, 2))),
    ):
        run = partial(jax.shard_map, f, mesh=mesh, in_specs=(P("d"), P("d")))
        # JAX 0.7 cannot run any program on an empty array with a sharding.
        jax.eval_shape(run(out_specs=P("d")), x, n)
        with pytest.raises(ValueError):
            jax.eval_shape(run(out_specs=P()), x, n)


def test_empty_results_stay_on_their_device():
    device = jax.devices()[3]
    put = partial(jax.device_put, device=device)
    for out in (
        pack_segments(put(jnp.ones((0, 2))), [0, 0], max_length=2),
        unpack_segments(put(jnp.ones((0, 3, 2))), [], total_length=2),
        unpack_segments(put(jnp.ones((2, 0, 2))), [0, 0], total_length=2),
    ):
        assert out.devices() == {device}

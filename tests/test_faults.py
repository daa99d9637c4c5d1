"""Faults that were found once, each held by the smallest call that showed it."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

from jax_revseg import (
    _reference,
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
from tests.cases import assert_same_bits

X = np.arange(32, dtype=np.float32).reshape(4, 8)
LENGTHS = np.array([3, 8, 0, 1])
ZEROS = jnp.zeros(4)


def export(f, *shapes):
    scope = jax.export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(s, scope=scope), dtype)
        for s, dtype in shapes
    ]
    return jax.export.export(jax.jit(f))(*specs)


def bits(*shape):
    """Random bits with many -0.0, subnormals and NaN payloads."""
    rng = np.random.default_rng(sum(shape))
    x = rng.integers(0, 2**32, shape, np.uint32)
    x.flat[::3], x.flat[1::5], x.flat[2::7] = 2**31, 1, 0x7FA00001
    return x.view(np.float32)


@pytest.mark.parametrize("errors", (checkify.index_checks, checkify.all_checks))
def test_index_checks_find_nothing(errors):
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
    error, _ = checkify.checkify(jax.value_and_grad(loss), errors=errors)(X, few)
    assert error.get() is None


def test_checkify_sees_the_lengths_of_packing():
    pack = partial(pack_segments, max_length=3)
    error, _ = checkify.checkify(pack)(X, jnp.array([1, 9]))
    assert "lengths[1] is 9" in (error.get() or "")
    unpack = partial(unpack_segments, total_length=9)
    error, _ = checkify.checkify(unpack)(X, jnp.array([1, 2, -1, 0]))
    assert "lengths[2] is -1" in (error.get() or "")


def test_packing_with_symbolic_sizes():
    rows, lengths = ("n, l, 2", np.float32), ("n", np.int32)
    x, n = (
        np.arange(24, dtype=np.float32).reshape(3, 4, 2),
        np.array([2, 0, 4], np.int32),
    )
    unpack = partial(unpack_segments, total_length=7)
    desired = unpack(x, n)
    assert_same_bits(export(unpack, rows, lengths).call(x, n), desired)
    host = export(lambda x: unpack(x, n), ("3, l, 2", np.float32))
    assert_same_bits(host.call(x), desired)

    def back(x, n):  # Both sizes are symbolic.
        flat = unpack_segments(x, n, total_length=x.shape[0] * x.shape[1])
        return pack_segments(flat, n, max_length=x.shape[1])

    valid = np.arange(4)[:, None] < n[:, None, None]
    assert_same_bits(export(back, rows, lengths).call(x, n), np.where(valid, x, 0))


@pytest.mark.parametrize("n", (3, 9, 2**31, 2**40, 2**64 - 1, 2**70))
def test_host_lengths_past_a_symbolic_axis(n):
    x = np.arange(4, dtype=np.float32)
    out = export(lambda x: reverse_sequence(x, n), ("t", np.float32)).call(x)
    np.testing.assert_array_equal(out, [2, 1, 0, 3] if n == 3 else [3, 2, 1, 0])
    packed = export(lambda x: reverse_segments(x, [1, n - 2]), ("t", np.float32))
    desired = [0, 1, 2, 3] if n == 3 else [0, 3, 2, 1]
    np.testing.assert_array_equal(packed.call(x), desired)


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


def test_no_zero_no_tail():
    x = np.ones((2, 4)).astype(ml_dtypes.float8_e8m0fnu)
    with pytest.raises(TypeError, match="no zero"):
        unpack_segments(x, [1, 2], total_length=5)


def test_no_leaks_with_a_pair_of_carries():
    def step(p, c, x):
        return (c[0] + p * x, c[1]), c[0]

    with jax.checking_leaks():
        carries = ((ZEROS, ZEROS),) * 2
        jax.jit(lambda x: bidirectional_scan(step, (1.0, 2.0), carries, x, LENGTHS))(X)


@pytest.mark.parametrize(
    "call, message",
    (
        (
            lambda: scan_segments(
                lambda c, x: ([c[0], c[1]], x), (ZEROS, ZEROS), X, LENGTHS
            ),
            r"f was given a carry of \(.*but returned one of \[",
        ),
        (
            lambda: bidirectional_scan(
                lambda p, c, x: c, (1.0, 1.0), (ZEROS, ZEROS), X, LENGTHS
            ),
            "f must return a pair",
        ),
        (
            lambda: bidirectional_scan(
                lambda p, c, x: (c, x), (1.0,) * 3, (ZEROS, ZEROS), X, LENGTHS
            ),
            "params must be a pair .*tuple of 3",
        ),
        (
            lambda: scan_segments(lambda c, x: (c, x), ZEROS, X, LENGTHS, unroll=1.5),
            "unroll is 1.5",
        ),
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


def test_two_lists_are_pairs():
    bidirectional_scan(
        lambda p, c, x: (c + x, c), [1.0, 1.0], [ZEROS, ZEROS], X, LENGTHS
    )


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


MANY = {
    "ordinary": [2, 4, 0, 1],
    "truncated": [9, 1, 0, 1],
    "past the end": [5, -2, 9, 2**31 - 1],
    "tail": [1, 0, 0, 2],
    "nothing": [0, 0, 0, 0],
}


def rows_to_flat(ct, lengths, size):
    """The transpose of packing, in loops: truncated steps get nothing."""
    out, start = np.zeros((size, *ct.shape[2:]), ct.dtype), 0
    for row, length in zip(ct, lengths, strict=True):
        length = max(0, min(length, size - start))
        kept = min(length, ct.shape[1])
        out[start : start + kept] = row[:kept]
        start += length
    return out


def flat_to_rows(ct, lengths, shape):
    """The transpose of unpacking, in loops: steps past the end get nothing."""
    out, start = np.zeros((*shape, *ct.shape[1:]), ct.dtype), 0
    for row, length in zip(out, lengths, strict=True):
        length = max(0, min(length, shape[1]))
        part = ct[start : start + length]
        row[: len(part)] = part
        start = min(start + length, len(ct))
    return out


def test_gradients_of_packing_are_exact():
    """Fails if a gradient adds, which changes -0.0, or drops other steps."""

    @partial(jax.jit, static_argnames="size")
    def vjps(x, ct_x, rows, ct_rows, n, size):
        pack = jax.vjp(lambda x: pack_segments(x, n, max_length=size), x)[1]
        unpack = jax.vjp(lambda x: unpack_segments(x, n, total_length=size), rows)[1]
        return pack(ct_x)[0], unpack(ct_rows)[0]

    for size in (0, 3, 12):
        x, rows = bits(11, 2), bits(4, 5, 2)
        ct_x, ct_rows = bits(4, size, 2), bits(size, 2)
        for name, lengths in MANY.items():
            n = jnp.array(lengths, jnp.int32)
            packed, unpacked = vjps(x, ct_x, rows, ct_rows, n, size)
            assert_same_bits(packed, rows_to_flat(ct_x, lengths, 11), name)
            assert_same_bits(unpacked, flat_to_rows(ct_rows, lengths, (4, 5)), name)


def test_gradients_of_packing_gather():
    n = jnp.array([2, 4, 0, 1])
    for f, x in (
        (partial(pack_segments, max_length=3), jnp.ones((11, 2))),
        (partial(unpack_segments, total_length=9), jnp.ones((4, 5, 2))),
    ):

        def loss(x, f=f):
            return (f(x, n) ** 3).sum()

        def second(x, loss=loss):
            return (jax.grad(loss)(x) ** 2).sum()

        remat = jax.checkpoint(loss)
        mapped = jax.vmap(jax.grad(loss))
        for g, operand in (
            (jax.grad(second), x),
            (jax.grad(remat), x),
            (mapped, x[None]),
        ):
            text = jax.jit(g).lower(operand).compile().as_text()
            assert "scatter(" not in text


@pytest.mark.parametrize("axes", ((0, 0), (0, None), (None, 0), (1, 1), (2, None)))
def test_packing_mapped_over_any_operand(axes):
    x_axis, n_axis = axes
    lengths = np.array([[2, 4, 0, 1], [9, 9, -1, 0], [0, 0, 3, 8]], np.int32)
    xs, cts = bits(3, 11, 2), bits(3, 4, 3, 2)

    def f(x, n, ct):
        out, vjp = jax.vjp(lambda x: pack_segments(x, n, max_length=3), x)
        return out, vjp(ct)[0]

    x = xs[0] if x_axis is None else np.moveaxis(xs, 0, x_axis)
    n = lengths[0] if n_axis is None else np.moveaxis(lengths, 0, n_axis)
    outs, gradients = jax.jit(jax.vmap(f, (*axes, 0)))(x, n, cts)
    for b in range(3):
        n = lengths[0 if n_axis is None else b]
        x = xs[0 if x_axis is None else b]
        assert_same_bits(outs[b], _reference.pack(x, n, max_length=3))
        assert_same_bits(gradients[b], rows_to_flat(cts[b], n.tolist(), 11))

"""Every public function under settings of JAX, and with operands of every kind.

A function that moves data from the host, promotes types without need, leaks a tracer or
depends on the strides of its operands fails here.
"""

import contextlib
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from tests.cases import assert_same_bits, enable_x64


@jax.jit  # Outside jit, NumPy's operators and slices move constants from the host.
def step(carry, x):
    return carry + x, carry


@jax.jit
def scaled(weight, carry, x):
    return carry + weight * x, carry


@jax.jit
def sums(x):
    return jax.lax.cumsum(x, 1)


add = jax.jit(jnp.add)
stack = jax.jit(lambda a, b: jnp.stack([a, b], -1))

FUNCTIONS = {
    "lengths": lambda x, o: reverse_sequence(x, o["n"]),
    "lengths value": lambda x, o: reverse_sequence(x, o["n"], padding_value=2),
    "lengths value on device": lambda x, o: reverse_sequence(
        x, o["n"], padding_value=o["value"]
    ),
    "packed": lambda x, o: reverse_segments(x, o["k"]),
    "ids": lambda x, o: reverse_segments(x, segment_ids=o["ids"], padding_id=0),
    "offsets": lambda x, o: reverse_segments(x, cu_seqlens=o["offsets"]),
    "order": lambda x, o: reverse_segment_order(x, o["k"]),
    "pack": lambda x, o: pack_segments(x, o["few"], max_length=3),
    "pack value": lambda x, o: pack_segments(
        x, o["few"], max_length=3, padding_value=2
    ),
    "unpack": lambda x, o: unpack_segments(x, o["n"], total_length=9),
    "scan lengths": lambda x, o: scan_segments(step, o["init"], x, o["n"]),
    "scan ids": lambda x, o: scan_segments(
        step, o["init"], x, segment_ids=o["ids"], padding_id=0, reverse=True
    ),
    "scan mask": lambda x, o: scan_segments(step, o["init"], x, mask=o["mask"]),
    "associative": lambda x, o: associative_scan_segments(
        add, x, segment_ids=o["ids"], padding_id=0
    ),
    "bidirectional": lambda x, o: bidirectional(sums, sums, merge=stack)(x, o["n"]),
    "both": lambda x, o: bidirectional_scan(
        scaled, (o["weight"],) * 2, (o["init"],) * 2, x, o["n"]
    ),
}


def operands(n=4, t=6, dtype=np.float32, index=np.int32):
    """Arrays on the host: `x` and all else."""
    rng = np.random.default_rng(n + t)
    x = rng.integers(1, 9, (n, t)).astype(dtype)
    k = np.stack([np.full(n, t // 3), np.arange(n) % 2 * (t // 2)], 1)
    ids = np.repeat(np.arange(-(-t // 2)), 2)[:t][None].repeat(n, 0)
    others = {
        "n": np.clip(np.arange(n), 0, t),
        "few": np.arange(n) % 2,
        "k": k,
        "ids": ids,
        "offsets": np.concatenate([k[:, :1] * 0, k.cumsum(1)], 1),
    }
    others = {name: array.astype(index) for name, array in others.items()}
    zero, one = np.zeros(n, dtype), np.ones((), dtype)
    return x, {**others, "mask": ids > 0, "init": zero, "value": one, "weight": one}


FEW = ("lengths", "packed", "ids", "pack", "unpack", "scan ids", "associative")
FEW = {name: FUNCTIONS[name] for name in FEW}
OWN = ("associative",)
SCANS = ("scan lengths", "scan ids", "scan mask", "both", *OWN)


def values(f, x, others):
    leaves = jax.tree.leaves(f(x, others))
    return [leaf for leaf in leaves if leaf.dtype == x.dtype]


def everything(x, others, functions=FUNCTIONS):
    """The values and a vector-Jacobian product of each function."""
    out = {}
    for name, f in functions.items():
        out[name], vjp = jax.vjp(partial(values, f, others=others), x)
        out[name] = out[name], vjp(out[name])[0]
    return out


def same(actual, desired):
    for name in desired:
        pairs = zip(*map(jax.tree.leaves, (actual[name], desired[name])), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.fixture(scope="module")
def on_device():
    x, others = jax.device_put(operands())
    return x, others, jax.jit(everything)(x, others)


def test_nothing_moves_from_the_host(on_device):
    """Fails if a constant is put on the device at each call."""
    x, others, desired = on_device
    with jax.transfer_guard("disallow"):
        # An eager `lax.associative_scan` moves constants itself, and so does the
        # gradient of an eager `lax.scan`.
        actual = {k: values(f, x, others) for k, f in FUNCTIONS.items() if k not in OWN}
        reversals = {k: f for k, f in FUNCTIONS.items() if k not in SCANS}
        gradients = everything(x, others, reversals)
    same(actual, {name: desired[name][0] for name in actual})
    same(gradients, {name: desired[name] for name in reversals})


@contextlib.contextmanager
def enable_checks():
    jax.config.update("jax_enable_checks", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_checks", False)


def test_settings_that_raise_find_nothing(on_device):
    """Fails if a function promotes by chance, makes NaNs of its own, or leaks."""
    x, others, desired = on_device
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        enable_checks(),
    ):
        same(jax.jit(everything)(x, others), desired)
    with jax.checking_leaks():
        jax.jit(everything).lower(x, others)
    names = ("order", "pack value", "unpack", "bidirectional")
    with jax.disable_jit():
        actual = {name: values(FUNCTIONS[name], x, others) for name in names}
    same(actual, {name: desired[name][0] for name in names})


@pytest.mark.parametrize("dtype", ("int4", "uint4"))
def test_four_bits(on_device, dtype):
    """Fails if lengths or data of four bits wrap, or are refused."""
    _, others, desired = on_device
    names = ("lengths value", "packed", "ids", "offsets", "order", "pack", "unpack")

    @jax.jit
    def run(x, others):
        return {name: values(FUNCTIONS[name], x, others) for name in names}

    data = (operands(dtype=dtype)[0], others)
    lengths = (on_device[0], operands(index=dtype)[1])
    for out in run(*data), run(*lengths):
        out = jax.tree.map(lambda y: np.asarray(y).astype(np.float32) % 16, out)
        same(out, {name: desired[name][0] for name in names})


def test_any_memory_layout_on_the_host(on_device, tmp_path):
    """Fails if a read-only, memory-mapped or strided array is misread or refused."""

    def fortran(a):
        return np.asfortranarray(a) if a.ndim else a

    def mapped(a):
        np.save(tmp_path / f"{id(a)}.npy", a)
        return np.load(tmp_path / f"{id(a)}.npy", mmap_mode="r")

    def negative(a):
        return a[::-1].copy()[::-1] if a.ndim else a

    desired = on_device[2]
    for convert in (fortran, negative, mapped):
        x, others = jax.tree.map(convert, operands())
        actual = {name: values(f, x, others) for name, f in FEW.items()}
        same(actual, {name: desired[name][0] for name in actual})


@pytest.mark.parametrize("size", ((0, 6), (4, 0), (4, 1)), ids=str)
def test_no_rows_no_steps_one_step(size):
    x, others = operands(*size)
    out = jax.jit(partial(everything, functions=FEW))(x, others)
    for name, (_, gradient) in out.items():
        assert gradient.shape == x.shape, name
    np.testing.assert_array_equal(out["lengths"][0][0], x)


def test_no_segments():
    x, others = operands()
    k, offsets = others["k"][:, :0], others["offsets"][:, :1]
    for kind in (np.asarray, jnp.asarray):
        assert_same_bits(reverse_segments(x, kind(k)), x)
        assert_same_bits(reverse_segments(x, cu_seqlens=kind(offsets)), x)
        assert_same_bits(reverse_segments(x, kind(k), padding_value=2), x * 0 + 2)
        assert_same_bits(reverse_segment_order(x, kind(k))[0], x)


def test_threads_that_call_with_new_shapes():
    wrong = []

    def work(i):
        x, others = operands(2 + i % 4, 5 + i)
        out = reverse_sequence(*jax.device_put((x, others["n"])))
        desired = _reference.reverse(
            x, others["n"], axis=1, batch_axes=(0,), layout="padded"
        )
        wrong.append(not np.array_equal(out, desired))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 32


def test_x64_switched_at_run_time(on_device):
    x, others, desired = on_device
    with enable_x64():
        wide = jax.device_put(operands(dtype=np.float64, index=np.int64))
        run = jax.jit(partial(everything, functions=FEW))
        same(run(*wide), {name: desired[name] for name in FEW})
        name = "lengths value"
        same({name: values(FUNCTIONS[name], x, others)}, {name: desired[name][0]})

"""Every public function under settings of JAX, and with operands of every kind.

A function that moves data from the host, promotes types without need, leaks a tracer or
depends on the strides of its operands fails here.
"""

import contextlib
import threading
from functools import partial

import jax
import numpy as np
import pytest

from jax_revseg import reverse_sequence
from tests import functions
from tests.cases import Case, enable_x64
from tests.functions import (
    FEW,
    FUNCTIONS,
    LINEAR,
    everything,
    operands,
    same_values,
    values,
)


@pytest.fixture(scope="module")
def on_device():
    x, others = jax.device_put(operands())
    run = jax.jit(everything)
    return x, others, run, run(x, others)


@contextlib.contextmanager
def settings_that_raise():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_key_reuse(True),
    ):
        yield


def test_eager_calls_move_nothing_and_promote_nothing(on_device):
    """Fails if a constant is put on the device at each call."""
    x, others, _, desired = on_device
    with jax.transfer_guard("disallow"), settings_that_raise():
        # An eager `lax.associative_scan` moves constants itself, and so does the
        # gradient of an eager `lax.scan`.
        scans = {k: f for k, f in functions.SCANS.items() if k != "associative"}
        actual = {name: values(f, x, others) for name, f in scans.items()}
        gradients = everything(x, others, LINEAR)
    same_values(actual, {name: desired[name][0] for name in actual})
    same_values(gradients, {name: desired[name] for name in LINEAR})


def test_settings_that_raise_find_nothing(on_device):
    """Fails if a function promotes by chance, makes NaNs of its own, or leaks."""
    x, others, run, desired = on_device
    jax.config.update("jax_enable_checks", True)
    try:
        with settings_that_raise(), jax.checking_leaks():
            jax.jit(everything).lower(x, others)
    finally:
        jax.config.update("jax_enable_checks", False)
    with jax.debug_nans(True):
        same_values(run(x, others), desired)
    few = {name: FUNCTIONS[name] for name in ("ids", "pack value", "bidirectional")}
    with jax.disable_jit():
        some = everything(x, others, few)
    same_values(some, {name: desired[name] for name in few})


def test_any_memory_layout_on_the_host(on_device, tmp_path):
    """Fails if a read-only, memory-mapped or strided array is misread or refused."""

    def fortran(a):
        return np.asfortranarray(a) if a.ndim else a

    def mapped(a):
        np.save(tmp_path / f"{id(a)}.npy", a)
        return np.load(tmp_path / f"{id(a)}.npy", mmap_mode="r")

    def negative(a):
        return a[::-1].copy()[::-1] if a.ndim else a

    desired = on_device[-1]
    for convert in (fortran, negative, mapped):
        x, others = jax.tree.map(convert, operands())
        actual = {name: values(f, x, others) for name, f in FEW.items()}
        same_values(actual, {name: desired[name][0] for name in actual})


def test_threads_that_call_with_new_shapes():
    wrong = []

    def work(i):
        x, others = operands(2 + i % 4, 5 + i)
        out = reverse_sequence(*jax.device_put((x, others["n"])))
        desired = Case("", x.shape).expected(x, others["n"])
        wrong.append(not np.array_equal(out, desired))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 16


def test_x64_switched_at_run_time(on_device):
    x, others, _, desired = on_device
    with enable_x64():
        wide = jax.device_put(operands(dtype=np.float64, index=np.int64))
        run = jax.jit(partial(everything, functions=FEW))
        same_values(run(*wide), {name: desired[name] for name in FEW})
        name = "lengths value"
        same_values(
            {name: values(FUNCTIONS[name], x, others)}, {name: desired[name][0]}
        )

"""One of two processes that hold an array between them: its rows, or its steps.

Run by test_processes.py, with the coordinator's address and a number.
"""

import os
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jax_revseg import _reference, associative_scan_segments
from tests.cases import Case
from tests.meshes import make_mesh, with_gradients

ROWS = Case("processes", (8, 6, 4), layout="packed")


def globally(mesh, x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def check(out, expected):
    """Each process looks at the shards that it holds, which are not all."""
    for shard in out.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def value_and_gradient(call, mesh, operands, specs):
    run = jax.jit(partial(with_gradients, call))
    y, x_bar = run(*map(partial(globally, mesh), operands, specs))
    assert not y.is_fully_addressable  # Or nothing is shared.
    return y, x_bar


def check_rows():
    rng = np.random.default_rng(0)
    x, ct = rng.integers(-9, 10, (2, *ROWS.shape)).astype(np.float32)
    segments, rows = ROWS.segments(), P("a")
    want = ROWS.expected(ct, segments)
    for mesh in (make_mesh(a=4), make_mesh("Explicit", a=4)):
        with jax.set_mesh(mesh):
            operands = x, segments, ct
            y, x_bar = value_and_gradient(ROWS.call, mesh, operands, (rows,) * 3)
        check(y, ROWS.expected(x, segments))
        check(x_bar, want)

    # Two rows that all devices share: the gradient is a sum over both processes.
    mesh, shared = make_mesh(a=4), x[:2]
    call = jax.shard_map(ROWS.call, mesh=mesh, in_specs=(P(), rows), out_specs=rows)
    operands = shared, segments, ct
    y, x_bar = value_and_gradient(call, mesh, operands, (P(), rows, rows))
    check(y, ROWS.expected(np.tile(shared, (4, 1, 1)), segments))
    check(x_bar, want.reshape(4, 2, *ct.shape[1:]).sum(0))


def check_steps():
    """A segment axis over both processes: exchanged for rows, and scanned in blocks."""
    case, mesh = Case("steps", (4, 16, 3), layout="ids"), make_mesh(a=4)
    ids, blocks = case.segments(), P(None, "a")
    numbers = np.random.default_rng(0).integers(-9, 10, (2, *case.shape))
    x, ct = numbers.astype(np.float32)  # Whole numbers: no rounding.

    def both(call, expected):
        local = partial(call, axis_name="a")
        call = jax.shard_map(local, mesh=mesh, in_specs=(blocks,) * 2, out_specs=blocks)
        y, x_bar = value_and_gradient(call, mesh, (x, ids, ct), (blocks,) * 3)
        check(y, expected(x, 1))
        check(x_bar, expected(ct, -1))

    def sums(x, ids, axis_name):
        scan = partial(associative_scan_segments, jnp.add, axis_name=axis_name)
        return scan(x, segment_ids=ids)

    def expected_sums(x, way):
        """Sums of each segment, from its start or from its end."""
        out = x.copy()
        for row, row_ids in zip(out, ids, strict=True):
            for start, end in _reference.id_bounds(row_ids, None):
                row[start:end][::way] = row[start:end][::way].cumsum(0)
        return out

    both(case.call, lambda x, way: case.expected(x, ids))
    both(sums, expected_sums)


def main(address, number):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    try:
        check_rows()
        check_steps()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # A usual exit waits minutes for the other one.
    print(jax.process_count(), "processes,", jax.device_count(), "devices: all right")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

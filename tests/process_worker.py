"""One of two processes that hold an array between them: its rows, or its steps.

Run by test_processes.py, with the coordinator's address and a number.
"""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from tests.cases import Case

ROWS = 8
CASES = tuple(
    Case(f"{layout}-processes", (ROWS, 6, 4), layout=layout, padding_id=0)
    for layout in ("padded", "packed", "ids")
)


def globally(mesh, x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def check(name, out, expected):
    """Each process looks at the rows that it holds."""
    for shard in out.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index], name)


def values_and_gradient(call):
    @jax.jit
    def both(x, segments, ct):
        y, vjp = jax.vjp(lambda x: call(x, segments), x)
        return y, vjp(ct)[0]

    return both


def check_rows():
    rng = np.random.default_rng(0)
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((jax.device_count(),), ("a",), axis_types=(axis_type,))
        for case in CASES:
            x, ct = rng.integers(-9, 10, (2, *case.shape)).astype(np.float32)
            segments = case.segments()
            operands = [globally(mesh, v, P("a")) for v in (x, segments, ct)]
            assert not operands[0].is_fully_addressable  # Or nothing is shared.
            with jax.set_mesh(mesh):
                y, x_bar = values_and_gradient(case.call)(*operands)
            check(case.name, y, case.expected(x, segments))
            check(case.name, x_bar, case.expected(ct, segments))

    # Two rows that all devices share: the gradient is a sum over both processes.
    auto = jax.make_mesh((jax.device_count(),), ("a",), axis_types=(AxisType.Auto,))
    for case in CASES:
        shared, segments = x[:2], case.segments()
        call = jax.shard_map(
            case.call, mesh=auto, in_specs=(P(), P("a")), out_specs=P("a")
        )
        y, x_bar = values_and_gradient(call)(
            globally(auto, shared, P()),
            globally(auto, segments, P("a")),
            globally(auto, ct, P("a")),
        )
        check(case.name, y, case.expected(np.tile(shared, (4, 1, 1)), segments))
        want = case.expected(ct, segments).reshape(4, 2, *ct.shape[1:]).sum(0)
        check(case.name, x_bar, want)


def check_steps():
    """One segment axis over both processes: features are exchanged, and rows."""
    mesh = jax.make_mesh((jax.device_count(),), ("seq",), axis_types=(AxisType.Auto,))
    blocks = P(None, "seq")
    for case, spec in (
        (Case("steps", (3, 16, 4)), P()),
        (Case("steps-ids", (4, 16, 3), layout="ids"), blocks),
    ):
        call = jax.shard_map(
            partial(case.call, axis_name="seq"),
            mesh=mesh,
            in_specs=(blocks, spec),
            out_specs=blocks,
        )
        segments = case.segments()
        x, ct = np.random.default_rng(0).normal(size=(2, *case.shape))
        x, ct = x.astype(np.float32), ct.astype(np.float32)
        y, x_bar = values_and_gradient(call)(
            globally(mesh, x, blocks),
            globally(mesh, segments, spec),
            globally(mesh, ct, blocks),
        )
        assert not y.is_fully_addressable  # Or one process would have it all.
        check(case.name, y, case.expected(x, segments))
        check(case.name, x_bar, case.expected(ct, segments))


def main(address, number):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    check_rows()
    check_steps()
    print(jax.process_count(), "processes,", jax.device_count(), "devices: all right")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

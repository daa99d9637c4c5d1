"""One of two processes that hold one segment axis between them.

Run by test_sequence_parallel.py, with the coordinator's address and a number.
"""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jax_revseg import _reference, reverse_segments, reverse_sequence


def by_ids(x, segment_ids, axis_name):
    return reverse_segments(x, segment_ids=segment_ids, axis_name=axis_name)


def main(address, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    mesh = jax.make_mesh((jax.device_count(),), ("seq",), axis_types=(AxisType.Auto,))
    blocks = P(None, "seq")

    def globally(x, spec=blocks):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def check(out, expected):
        assert not out.is_fully_addressable  # Or one process would have it all.
        for shard in out.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])

    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 17, 3)
    ids = np.sort(rng.integers(0, 4, (4, 16)), -1)
    for layout, shape, segments, spec, reverse in (
        ("padded", (3, 16, 4), lengths, P(), reverse_sequence),  # Exchanges features,
        ("ids", (4, 16, 3), ids, blocks, by_ids),  # and rows.
    ):
        f = jax.shard_map(
            partial(reverse, axis_name="seq"),
            mesh=mesh,
            in_specs=(blocks, spec),
            out_specs=blocks,
        )

        @jax.jit
        def both(x, segments, ct, f=f):
            out, pullback = jax.vjp(lambda x: f(x, segments), x)
            return out, pullback(ct)[0]

        x, ct = rng.normal(size=(2, *shape)).astype(np.float32)
        results = both(globally(x), globally(segments, spec), globally(ct))
        for operand, result in zip((x, ct), results, strict=True):
            expected = _reference.reverse(
                operand, segments, axis=1, batch_axes=(0,), layout=layout
            )
            check(result, expected)
    print(jax.device_count(), "devices, values and gradients right")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Other forms of the lowering, each a few lines, timed beside the one that was taken.

They take valid lengths, and none of them is used by the library. Three compute less
than a reversal and are there as bounds: `lax.rev` of whole rows, a gather whose index
is given, and our own where all rows are full, so that it reads memory in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.contenders import Function, Operands, pasted_index
from benchmarks.timing import Contender
from jax_revseg import reverse_sequence
from tests.cases import BENCHMARKS, Case

CASES = {f"forms-{case.name}": case for case in BENCHMARKS if case.dtype == "float32"}


def row_gather(x: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
    """Gathers x[n, index[n, t]], or x[index[t, n], n] for axis 0.

    Rows are batch dimensions, features the window.
    """
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(2, x.ndim)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    sizes = (1, 1, *x.shape[2:])
    return lax.gather(x, index[..., None], dims, sizes, mode="promise_in_bounds")


def window(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """One window of T a row, out of x padded on the left, reversed where valid."""
    size = x.shape[1]
    padded = jnp.pad(x, [(0, 0), (size, 0)] + [(0, 0)] * (x.ndim - 2))
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, x.ndim)),
        collapsed_slice_dims=(),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(0,),
    )
    sizes = (1, *x.shape[1:])
    rows = lax.gather(padded, lengths[:, None], dims, sizes, mode="promise_in_bounds")
    valid = jnp.arange(size) < lengths[:, None]
    return jnp.where(lax.expand_dims(valid, range(2, x.ndim)), lax.rev(rows, (1,)), x)


def transposed(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Time-major rows by way of batch-major ones."""
    return reverse_sequence(x.swapaxes(0, 1), lengths).swapaxes(0, 1)


def flat(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Time-major rows as one axis of steps and rows, gathered by one number each."""
    t, n = jnp.indices(x.shape[:2], dtype=jnp.uint32)
    ends = lengths.astype(jnp.uint32)
    index = jnp.where(t < ends, ends - 1 - t, t) * x.shape[1] + n
    rows = x.reshape(-1, *x.shape[2:])
    return rows.at[index].get(mode="promise_in_bounds")


def columns(x: jax.Array, lengths: jax.Array, width: int = 32) -> jax.Array:
    """Time-major rows, so many at a time that what they read stays in a cache."""

    def some(i: jax.Array, out: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(x, i * width, width, 1)
        own = lax.dynamic_slice_in_dim(lengths, i * width, width)
        block = reverse_sequence(block, own, axis=0, batch_axis=1)
        return lax.dynamic_update_slice_in_dim(out, block, i * width, 1)

    return lax.fori_loop(0, x.shape[1] // width, some, jnp.zeros_like(x))


def arithmetic(lengths: jax.Array, size: int) -> jax.Array:
    t = jnp.arange(size)
    return t + (t < lengths[:, None]) * (lengths[:, None] - 1 - 2 * t)


def compare_all(lengths: jax.Array, size: int) -> jax.Array:
    """The segment of each position by K comparisons: K times T of them in all."""
    ends, t = jnp.cumsum(lengths, 1), jnp.arange(size)
    return _by_number(lengths, ends, jnp.sum(t[:, None] >= ends[:, None, :], -1))


def _by_number(lengths: jax.Array, ends: jax.Array, k: jax.Array) -> jax.Array:
    t, inside = jnp.arange(k.shape[1]), k < ends.shape[1]
    k = jnp.minimum(k, ends.shape[1] - 1)
    end = jnp.take_along_axis(ends, k, 1)
    start = end - jnp.take_along_axis(lengths, k, 1)
    return jnp.where(inside, start + end - 1 - t, t)


def running_sum(lengths: jax.Array, size: int) -> jax.Array:
    """The same number as the running sum of a 1 at each end."""
    ends = jnp.cumsum(lengths, 1)
    rows = jnp.arange(len(ends))[:, None]
    ones = jnp.zeros((len(ends), size), ends.dtype).at[rows, ends].add(1, mode="drop")
    return _by_number(lengths, ends, jnp.cumsum(ones, 1))


def forms(case: Case) -> dict[str, Function]:
    def by(index: Callable[[jax.Array, int], jax.Array]) -> Function:
        return lambda x, segments: row_gather(x, index(segments, case.size))

    if case.axis == 0:
        return {
            "between transposes": transposed,
            "flat index": flat,
            "32 columns at a time": columns,
        }
    if case.layout == "padded":
        return {"row gather": by(arithmetic), "padded window": window}
    pasted = by(lambda segments, size: pasted_index(segments, size, case))
    if case.layout == "ids":
        return {"running maxima": pasted}
    return {
        "compare with all ends": by(compare_all),
        "binary search": pasted,
        "scatter and running sum": by(running_sum),
    }


def contenders(o: Operands) -> Iterator[Contender]:
    for name, function in forms(o.case).items():
        yield Contender(name, o.reused(function, o.x, o.s))
    axis, size = o.case.axis, o.case.size
    index = pasted_index(o.s, size, o.case)
    given = o.reused(
        partial(row_gather, axis=axis), o.x, index.T if axis == 0 else index
    )
    yield Contender("bound: given index", given)
    if o.case.layout == "padded":
        full = o.reused(o.case.call, o.x, jnp.full_like(o.s, size))
        yield Contender("bound: full rows", full, whole=None)
        whole = o.reused(lambda x: lax.rev(x, (axis,)), o.x)
        yield Contender("bound: lax.rev", whole, whole=None)

"""A Pallas kernel for TPUs that reads each row once and writes it once.

A grid step holds the whole segment axis of a row in VMEM, for at most 1024 features,
and copies step `source(t)` to step `t`. No axis of `x` moves: blocks are cut from `x`
as it lies in memory, its last axis along the lanes of registers and the one before it
along their sublanes. That one may be the segment axis, a batch axis (a block then has
several rows, each with its own segments) or a feature axis.

It runs where `implementation="pallas"` asks for it and `plan` finds blocks. Importing
Pallas takes longer than all the rest: only the lowering may import this file.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_revseg import _compat
from jax_revseg._lowering import clip_lengths, source_index

_LANES, _SUBLANES = 128, 8
# The least that any generation of TPUs gives a kernel is 16 MiB, not all of it for us.
_VMEM_BYTES = 14 * 2**20
_MOST_STEPS, _WIDTHS = 512, (1024, 512, 256, 128)
_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2") + tuple(
    f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32)
)


class Plan(NamedTuple):
    """The blocks: along the segment axis, the last one, and the one before the last."""

    steps: int  # A block of the input has `blocks` times as many.
    blocks: int
    width: int
    rows: int | None  # None where the axis before the last is the segment axis.


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def plan(x: Any, *, axis: int, batch_axes: tuple[int, ...]) -> Plan | None:
    """The blocks for an x of this shape and dtype, or None where XLA must do it."""
    last = x.ndim - 1
    if not all(isinstance(n, int) and n > 0 for n in x.shape):  # Symbolic, or empty.
        return None
    if last in (axis, *batch_axes) or x.shape[last] < _LANES:
        return None
    if str(x.dtype) not in _DTYPES:  # The others do not compile.
        return None
    packed = 4 // x.dtype.itemsize  # Small values share words of 32 bits.
    tile = _SUBLANES * packed
    rows = None if axis == last - 1 else tile
    blocks = -(-x.shape[axis] // _MOST_STEPS)
    multiple = _LANES if blocks > 1 else tile if rows is None else 1
    steps = _round_up(-(-x.shape[axis] // blocks), multiple)
    # Of input and output alike, one block is worked on while another one is on its way,
    # and small values are in a third one, as words.
    copies = 2 if packed == 1 else 3
    column = copies * (blocks + 1) * steps * (rows or 1) * x.dtype.itemsize
    for width in _WIDTHS:
        width = min(width, _round_up(x.shape[last], _LANES))
        if width * column <= _VMEM_BYTES:
            return Plan(steps, blocks, width, rows)
    return None


def _bitcast(source: Any, target: Any) -> None:
    """Copies a block of small values into words of 32 bits, or back, by whole tiles."""

    def tile(ref: Any, i: jax.Array) -> Any:
        if ref.ndim == 3:
            return i
        rows = _SUBLANES * 4 // ref.dtype.itemsize
        return pl.ds(pl.multiple_of(i * rows, rows), rows)

    def copy(i: jax.Array, _: None) -> None:
        target[tile(target, i)] = pltpu.bitcast(source[tile(source, i)], target.dtype)

    words = min(source, target, key=lambda ref: ref.shape[-2])
    tiles = words.shape[0] // (1 if words.ndim == 3 else _SUBLANES)
    lax.fori_loop(0, tiles, copy, None)


def _kernel(
    table: Any, x: Any, out: Any, *words: Any, layout: str, batched: bool, last: int
) -> None:
    """Copies each step of a block of `out` from the position that `table` says."""
    bits = 8 * out.dtype.itemsize
    packed = 32 // bits if words else 1
    steps, block = out.shape[0], pl.program_id(last)
    source, target = words or (x, out)
    if words:
        pl.when(block == 0)(partial(_bitcast, x, source))  # x is the same for them all.

    def position(row: int, t: jax.Array) -> jax.Array:
        if layout != "padded":
            return table[row, t]
        t, end = t + block * steps, table[row, 0]
        return jnp.where(t < end, end - 1 - t, t)

    def merged(rows: list[tuple[jax.Array, Any]]) -> jax.Array:
        """One word (of each lane) from one value of each of these words."""
        if packed == 1:
            return rows[0][0]
        word = jnp.uint32(0)
        for k, (row, at) in enumerate(rows):
            value = row >> jnp.uint32(at * bits) & jnp.uint32(2**bits - 1)
            word |= value << jnp.uint32(k * bits)
        return word

    def copy(t: jax.Array, _: None) -> None:
        if target.ndim == 3 and not batched:
            target[t] = source[position(0, t)]
            return
        for i in range(_SUBLANES):  # Unrolled: addresses take longer than the copy.
            if batched:  # Rows share words.
                at = [position(i * packed + k, t) for k in range(packed)]
                rows = [(source[s, pl.ds(i, 1)], k) for k, s in enumerate(at)]
                target[t, pl.ds(i, 1)] = merged(rows)
            else:  # Steps share words.
                word = t * _SUBLANES + i
                at = [position(0, word * packed + k) for k in range(packed)]
                rows = [
                    (source[pl.ds(lax.div(s, packed), 1)], lax.rem(s, packed))
                    for s in at
                ]
                target[pl.ds(word, 1)] = merged(rows)

    tiles = target.shape[0] // (1 if target.ndim == 3 else _SUBLANES)
    lax.fori_loop(0, tiles, copy, None)
    if words:
        _bitcast(target, out)


# One function in the module for any number of calls with these shapes.
@partial(
    jax.jit,
    static_argnames=(
        *("plan", "axis", "batch_axes", "layout", "padding_id", "interpret"),
    ),
)
def reverse(
    x: jax.Array,
    segments: jax.Array,
    *,
    plan: Plan,
    axis: int,
    batch_axes: tuple[int, ...],
    layout: str,
    padding_id: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Reverses segments, in the blocks that `plan` found for x."""
    size, last = x.shape[axis], x.ndim - 1
    steps, blocks, width, rows = plan
    batched = rows is not None and last - 1 in batch_axes

    # The grid goes over all axes of x, over the segment axis last: the input has all of
    # that in one block, which is fetched once. Other axes are cut to single indices.
    order = [*(a for a in range(x.ndim) if a != axis), axis]
    block: list[int | None] = [None] * x.ndim
    if rows is not None:
        block[last - 1] = rows
    block[last], block[axis] = width, steps
    x_block = [*block[:axis], steps * blocks, *block[axis + 1 :]]
    grid = tuple(pl.cdiv(x.shape[a], block[a] or 1) for a in order)

    # The lengths, or the source of each step; rows that share a block lie side by side.
    by_length = layout == "padded"
    if by_length:
        table = clip_lengths(segments, size)[..., None]
    else:
        table = source_index(segments, size, layout, padding_id)
    outer = sorted(batch_axes)  # The axis before the last comes last, if among them.
    table = lax.transpose(table, (*map(batch_axes.index, outer), len(outer)))
    if batched:
        outer.pop()
    else:
        table = table[..., None, :]
    table_block = (rows or 1 if batched else 1, 1 if by_length else steps)
    # Nothing that a block reads beyond the end of x is used, but it must be in VMEM.
    padding = [
        (0, -n % m, 0) for n, m in zip(table.shape[-2:], table_block, strict=True)
    ]
    table = lax.pad(table.astype(jnp.int32), 0, [(0, 0, 0)] * len(outer) + padding)

    def index(*ids: Any) -> tuple[Any, ...]:
        return tuple(ids[order.index(a)] for a in range(x.ndim))

    def table_index(*ids: Any) -> tuple[Any, ...]:
        at = index(*ids)
        row, step = at[last - 1] if batched else 0, 0 if by_length else ids[-1]
        return (*(at[a] for a in outer), row, step)

    # Steps (or rows) that share words, and do not move together, are copied in words.
    words: list[tuple[int, ...]] = []
    packed = 4 // x.dtype.itemsize
    if packed > 1 and rows is None:
        words = [(n // packed, width) for n in (steps * blocks, steps)]
    elif packed > 1 and rows and batched:
        words = [(n, rows // packed, width) for n in (steps * blocks, steps)]
    return pl.pallas_call(
        partial(_kernel, layout=layout, batched=batched, last=len(grid) - 1),
        out_shape=_compat.struct_like(x),
        grid=grid,
        in_specs=[
            pl.BlockSpec(
                (*(None for _ in outer), *table_block),
                table_index,
                memory_space=pltpu.SMEM,
            ),
            pl.BlockSpec(x_block, lambda *ids: index(*ids[:-1], 0)),
        ],
        out_specs=pl.BlockSpec(block, index),
        scratch_shapes=[pltpu.VMEM(shape, jnp.uint32) for shape in words],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",)
        ),
        # XLA cannot look inside, and would take it for free.
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * x.size * x.dtype.itemsize + 4 * table.size,
        ),
        interpret=interpret,
        name="reverse_segments",
    )(table, x)

"""A Pallas kernel for TPUs that reads each row once and writes it once.

A grid step holds the whole segment axis of a row in VMEM, for at most 1024 features,
and copies step `source(t)` to step `t`. No axis of `x` moves: blocks are cut from `x`
as it lies in memory, its last axis along the lanes of registers and the one before it
along their sublanes. That one may be the segment axis, a batch axis (a block then has
several rows, each with its own segments) or a feature axis.

Only `implementation="pallas"` asks for it; `plan` raises where the kernel cannot run.
Importing Pallas takes longer than importing the rest of the package: only the lowering
may import this file.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_revseg import _compat
from jax_revseg._layout import Layout
from jax_revseg._lowering import clip_lengths, source_index

_LANES, _SUBLANES = 128, 8
# Stay below the smallest VMEM limit of any TPU generation, 16 MiB.
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


def plan(x: Any, layout: Layout) -> Plan:
    """Returns the blocks for an x of this shape and dtype; raises if there are none."""

    def refuse(why: str) -> NoReturn:
        raise ValueError(
            f"reverse_segments: implementation is 'pallas', but x has shape {x.shape}, "
            f"dtype {x.dtype}, and the kernel needs {why}; leave implementation out."
        )

    axis, last = layout.axis, x.ndim - 1
    if not all(isinstance(n, int) and n > 0 for n in x.shape):
        refuse("static sizes above 0")
    if last in (axis, *layout.batch_axes) or x.shape[last] < _LANES:
        refuse(f"a last axis of {_LANES} or more features")
    if str(x.dtype) not in _DTYPES:
        refuse(f"one of the dtypes {', '.join(_DTYPES)}")
    packed = 4 // x.dtype.itemsize  # Small values share words of 32 bits.
    tile = _SUBLANES * packed
    rows = None if axis == last - 1 else tile
    blocks = -(-x.shape[axis] // _MOST_STEPS)
    multiple = _LANES if blocks > 1 else tile if rows is None else 1
    steps = _round_up(-(-x.shape[axis] // blocks), multiple)
    # The pipeline holds two blocks of input and output; small values need a third one,
    # as words.
    copies = 2 if packed == 1 else 3
    column = copies * (blocks + 1) * steps * (rows or 1) * x.dtype.itemsize
    for width in _WIDTHS:
        width = min(width, _round_up(x.shape[last], _LANES))
        if width * column <= _VMEM_BYTES:
            return Plan(steps, blocks, width, rows)
    refuse(f"the segment axis of a row in {_VMEM_BYTES >> 20} MiB of VMEM")


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


def _merge(values: list[tuple[jax.Array, Any]]) -> jax.Array:
    """Puts one small value from each of these words into one word of each lane."""
    if len(values) == 1:
        return values[0][0]
    bits, word = 32 // len(values), jnp.uint32(0)
    for k, (source, at) in enumerate(values):
        value = source >> jnp.uint32(at * bits) & jnp.uint32(2**bits - 1)
        word |= value << jnp.uint32(k * bits)
    return word


def _copy_whole_step(source: Any, target: Any, position: Any, _packed: int, t: Any, _):
    target[t] = source[position(0, t)]


def _copy_rows(source: Any, target: Any, position: Any, packed: int, t: Any, _):
    """Copies a step of 8 words a lane, where rows share words."""
    for i in range(_SUBLANES):  # Unrolled: addresses take longer than the copy.
        at = [position(i * packed + k, t) for k in range(packed)]
        values = [(source[s, pl.ds(i, 1)], k) for k, s in enumerate(at)]
        target[t, pl.ds(i, 1)] = _merge(values)


def _copy_steps(source: Any, target: Any, position: Any, packed: int, t: Any, _):
    """Copies 8 words a lane, where steps share words."""
    for i in range(_SUBLANES):
        word = t * _SUBLANES + i
        at = [position(0, word * packed + k) for k in range(packed)]
        values = [
            (source[pl.ds(lax.div(s, packed), 1)], lax.rem(s, packed)) for s in at
        ]
        target[pl.ds(word, 1)] = _merge(values)


def _kernel(
    table: Any, x: Any, out: Any, *words: Any, by_length: bool, batched: bool, last: int
) -> None:
    """Copies each step of a block of `out` from the position in `table`."""
    packed = 4 // out.dtype.itemsize if words else 1
    steps, block = out.shape[0], pl.program_id(last)
    source, target = words or (x, out)
    if words:  # All blocks of steps read the same block of x.
        pl.when(block == 0)(partial(_bitcast, x, source))

    def position(row: int, t: jax.Array) -> jax.Array:
        if not by_length:
            return table[row, t]
        t, end = t + block * steps, table[row, 0]
        return jnp.where(t < end, end - 1 - t, t)

    whole = target.ndim == 3 and not batched
    copy = _copy_whole_step if whole else _copy_rows if batched else _copy_steps
    tiles = target.shape[0] // (1 if target.ndim == 3 else _SUBLANES)
    lax.fori_loop(0, tiles, partial(copy, source, target, position, packed), None)
    if words:
        _bitcast(target, out)


def _table(segments: Any, x: Any, plan: Plan, layout: Layout, index: Any) -> Any:
    """The lengths, or the source of each step, and the part that a block of x needs.

    `index` gives the block of `x` at each grid step. Rows that share a block of `x`
    share one of the table.
    """
    size, before = x.shape[layout.axis], x.ndim - 2
    by_length, batched = layout.kind == "padded", _batched(x, plan, layout)
    if by_length:
        table = clip_lengths(segments, size)[..., None]
    else:
        table = source_index(segments, size, layout)
    outer = sorted(layout.batch_axes)  # The axis before the last of x comes last.
    table = lax.transpose(table, (*map(layout.batch_axes.index, outer), len(outer)))
    if batched:
        outer.remove(before)
    else:
        table = table[..., None, :]
    block = (plan.rows or 1 if batched else 1, 1 if by_length else plan.steps)
    # A block may read beyond the end of x; that must be in VMEM, but is not used.
    padding = [(0, 0, 0)] * (table.ndim - 2) + [
        (0, -n % m, 0) for n, m in zip(table.shape[-2:], block, strict=True)
    ]
    table = lax.pad(table.astype(jnp.int32), 0, padding)

    def table_index(*ids: Any) -> tuple[Any, ...]:
        at = index(*ids)
        row, step = at[before] if batched else 0, 0 if by_length else ids[-1]
        return (*(at[a] for a in outer), row, step)

    shape = (*(None for _ in outer), *block)
    return table, pl.BlockSpec(shape, table_index, memory_space=pltpu.SMEM)


def _batched(x: Any, plan: Plan, layout: Layout) -> bool:
    """Whether a block has several rows, each with segments of its own."""
    return plan.rows is not None and x.ndim - 2 in layout.batch_axes


def _word_shapes(plan: Plan, batched: bool, packed: int) -> list[tuple[int, ...]]:
    """Scratch for steps or rows that share words and do not move together."""
    steps, blocks, width, rows = plan
    if packed > 1 and rows is None:
        return [(n // packed, width) for n in (steps * blocks, steps)]
    if packed > 1 and rows and batched:
        return [(n, rows // packed, width) for n in (steps * blocks, steps)]
    return []


# One function in the module for any number of calls with these shapes.
@partial(jax.jit, static_argnames=("plan", "layout", "interpret"))
def reverse(
    x: jax.Array,
    segments: jax.Array,
    *,
    plan: Plan,
    layout: Layout,
    interpret: Any = False,
) -> jax.Array:
    """Reverses segments, in the blocks that `plan` found for x."""
    axis, last = layout.axis, x.ndim - 1
    steps, blocks, width, rows = plan
    batched = _batched(x, plan, layout)

    # The grid covers all axes of x, the segment axis last: one input block holds that
    # whole axis and is fetched once. Other axes are cut to single indices.
    order = [*(a for a in range(x.ndim) if a != axis), axis]
    block: list[int | None] = [None] * x.ndim
    if rows is not None:
        block[last - 1] = rows
    block[last], block[axis] = width, steps
    x_block = [*block[:axis], steps * blocks, *block[axis + 1 :]]

    def index(*ids: Any) -> tuple[Any, ...]:
        return tuple(ids[order.index(a)] for a in range(x.ndim))

    table, table_spec = _table(segments, x, plan, layout, index)
    kernel = partial(
        _kernel, by_length=layout.kind == "padded", batched=batched, last=last
    )
    return pl.pallas_call(
        kernel,
        out_shape=_compat.struct_like(x),
        grid=tuple(pl.cdiv(x.shape[a], block[a] or 1) for a in order),
        in_specs=[table_spec, pl.BlockSpec(x_block, lambda *i: index(*i[:-1], 0))],
        out_specs=pl.BlockSpec(block, index),
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.uint32)
            for shape in _word_shapes(plan, batched, 4 // x.dtype.itemsize)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * last + ("arbitrary",)
        ),
        # XLA cannot look inside, and would assume that the kernel costs nothing.
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * x.size * x.dtype.itemsize + 4 * table.size,
        ),
        interpret=interpret,
        name="reverse_segments",
    )(table, x)

"""The program of `associative_scan_segments`, also over the blocks of a sharded axis.

Steps are pairs (whether a segment starts within, value). Each device scans its block.
The blocks then exchange their last pairs, and what enters a block is combined with its
steps up to the first start:

    ids      0 0 0 | 0 1 1 | 1 2 2
    scanned  a ab abc | d e ef | g h hi        e and h start anew
    enters           abc       ef              before d, and before g
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_revseg._arguments import Call
from jax_revseg._boundaries import shift
from jax_revseg._carry import alike, describe, same_types
from jax_revseg._layout import Layout
from jax_revseg._lowering import align
from jax_revseg._steps import (
    first_steps,
    first_valid,
    masks,
    resets,
    select,
    take_step,
    zero_padding,
)


def combine_rows(fn, elems, carry_in, segments, *, call, layout, reverse):
    """The program of `associative_scan_segments`."""
    axis, batch_axes = layout.axis, layout.batch_axes
    size = jax.tree.leaves(elems)[0].shape[axis]
    if size == 0:
        return elems
    rows, rank = range(len(batch_axes)), max(axis, *batch_axes, 0) + 1
    valid, starts = masks(call, segments, size, layout)
    elems, carry_in, (valid, starts) = alike(
        call, (elems, batch_axes), (carry_in, rows), ((valid, starts), rows)
    )
    if starts is None:
        starts = first_steps(call, None, valid, False) | ~valid
    first = None
    if valid is not None:
        step = partial(first_valid, valid=valid, reverse=reverse, layout=layout)
        first = jax.tree.map(step, elems)
    combine = partial(_combine, call, fn, first)
    if carry_in is not None:
        entered = first_steps(call, valid, starts, reverse)
        elems = _enter(combine, elems, carry_in, entered, layout)
    starts = resets(call, valid, starts, reverse)
    if call.axis_name is None:
        # The first step is a start. Say so by a pad, which XLA:CPU writes to memory: it
        # would compute a comparison again for each of its many users.
        starts = shift(shift(starts, 1 if reverse else -1), -1 if reverse else 1, True)
    starts = align(starts, rank, layout)
    pairs = lax.associative_scan(combine, (starts, elems), reverse=reverse, axis=axis)
    if call.axis_name is not None:
        pairs = combine(_before(call, combine, pairs, reverse, axis), pairs)
    return (
        pairs[1]
        if valid is None
        else zero_padding(pairs[1], align(valid, rank, layout))
    )


def _combine(call: Call, fn: Any, first: Any, a: Any, b: Any) -> Any:
    (starts_a, a), (starts_b, b) = a, b
    # Where a belongs to another segment, fn gets a constant twice: neither an infinity
    # in a nor one in b can then give NaN gradients. It is b, or where there is padding
    # the first valid step of the row.
    constant = lax.stop_gradient(b) if first is None else first
    out = fn(select(starts_b, constant, a), select(starts_b, constant, b))
    if not same_types(out, b):
        call.fail(
            f"fn was given {describe(b)}, but returned {describe(out)}; it must return "
            "the structure, shapes and dtypes of elems.",
            TypeError,
        )
    return starts_a | starts_b, select(starts_b, b, out)


def _enter(combine: Any, elems: Any, carry: Any, first: Any, layout: Layout) -> Any:
    """Combines what enters each row with its first valid step."""
    rank = max(layout.axis, *layout.batch_axes, 0) + 1
    index = jnp.argmax(first, -1, keepdims=True)
    absent = align(~first.any(-1, keepdims=True), rank, layout)
    step = jax.tree.map(lambda x: take_step(x, index, layout), elems)
    carry = jax.tree.map(lambda x: jnp.expand_dims(x, layout.axis), carry)
    _, step = combine((absent, carry), (absent, step))
    step = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), step, elems)
    return select(align(first, rank, layout), step, elems)


def _before(call: Call, combine: Any, pairs: Any, reverse: bool, axis: int) -> Any:
    """What the blocks before this one, in the scan's direction, combine to.

    The first block gets any pair: its first step starts a segment.
    """

    def ends(x: jax.Array) -> jax.Array:
        last = lax.index_in_dim(x, 0 if reverse else -1, axis)
        return lax.all_gather(last, call.axis_name, axis=axis, tiled=True)

    ends = jax.tree.map(ends, pairs)
    ends = lax.associative_scan(combine, ends, reverse=reverse, axis=axis)
    block = lax.axis_index(call.axis_name) + (1 if reverse else -1)
    block = jnp.clip(block, 0, call.devices - 1)

    def leaf(ends: jax.Array, x: jax.Array) -> jax.Array:
        end = lax.dynamic_index_in_dim(ends, block, axis)
        return jnp.broadcast_to(end, x.shape)

    return jax.tree.map(leaf, ends, pairs)

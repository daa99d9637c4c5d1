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

from jax_revseg import _steps
from jax_revseg._arguments import Call
from jax_revseg._boundaries import shift
from jax_revseg._carry import alike, describe, same_types
from jax_revseg._lowering import with_features


def combine_rows(fn, elems, carry_in, segments, *, call, layout, reverse):
    """The program of `associative_scan_segments`."""
    axis, at, batch_axes = layout.axis, layout.time_axis, layout.batch_axes
    _, size = layout.sizes(elems)
    if size == 0:
        return elems
    rows, rank = range(len(batch_axes)), max(axis, *batch_axes, 0) + 1
    steps = _steps.find_steps(call, segments, size, layout, reverse)
    elems, carry_in, steps = alike(
        call,
        (elems, batch_axes),
        (carry_in, rows),
        (steps, [a for a in range(len(rows) + 1) if a != at]),
    )
    valid, starts, first = steps
    padding = None
    if valid is not None:
        padding = jax.tree.map(lambda x: _steps.first_valid(x, first, layout), elems)
    combine = partial(_combine, call, fn, padding)
    if carry_in is not None:
        first = _steps.enters(call, steps, at, reverse)
        here = with_features(_steps.is_at(first, starts, at), rank, layout)
        elems = _enter(combine, elems, carry_in, first, here, layout)
    if call.axis_name is None:
        # The first step is a start. Say so by a pad, which XLA:CPU writes to memory: it
        # would compute a comparison again for each of its many users.
        by = 1 if reverse else -1
        starts = shift(shift(starts, by, axis=at), -by, True, axis=at)
    starts = with_features(starts, rank, layout)
    pairs = lax.associative_scan(combine, (starts, elems), reverse=reverse, axis=axis)
    if call.axis_name is not None:
        pairs = combine(_before(call, combine, pairs, reverse, axis), pairs)
    if valid is None:
        return pairs[1]
    return _steps.zero_padding(pairs[1], with_features(valid, rank, layout))


def _combine(call: Call, fn: Any, first: Any, a: Any, b: Any) -> Any:
    (starts_a, a), (starts_b, b) = a, b
    # Where a belongs to another segment, fn gets a constant twice: neither an infinity
    # in a nor one in b can then give NaN gradients. It is b, or where there is padding
    # the first valid step of the row.
    constant = lax.stop_gradient(b) if first is None else first
    out = fn(_steps.select(starts_b, constant, a), _steps.select(starts_b, constant, b))
    if not same_types(out, b):
        call.fail(
            f"fn was given {describe(b)}, but returned {describe(out)}; it must return "
            "the structure, shapes and dtypes of elems.",
            TypeError,
        )
    return starts_a | starts_b, _steps.select(starts_b, b, out)


def _enter(combine, elems, carry, first, here, layout):
    """Combines what enters each row with its first valid step."""
    step = jax.tree.map(lambda x: _steps.take_step(x, first, layout), elems)
    carry = jax.tree.map(lambda x: jnp.expand_dims(x, layout.axis), carry)
    absent = with_features(first < 0, here.ndim, layout)
    _, step = combine((absent, carry), (absent, step))
    return _steps.select(here, step, elems)


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

    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, block, axis), ends)

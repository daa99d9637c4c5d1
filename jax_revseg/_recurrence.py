"""The programs of `scan_segments` and `bidirectional_scan`.

A step of the loop gives `f` the carry where the segment goes on, and `init` where it
starts. At padding, `f` gets the carry that enters the row and the first valid step of
the row, and its result is discarded. So `f` never sees an input that a loop over valid
steps would not give it, and padding cannot cause NaNs, not even in gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_map_with_path

from jax_revseg import _compat, _steps
from jax_revseg._arguments import Call
from jax_revseg._carry import alike, check_step
from jax_revseg._lowering import pad_to_multiple


class _Loop(NamedTuple):
    """What a loop needs: carries of `(*batch, ...)`, and time-major arrays."""

    carry: Any  # Before the first step.
    init: Any  # At the start of a segment.
    padding: Any  # At padding; None where `init` is right there, too.
    first: Any  # The first valid step of each row; unused where all are valid.
    xs: Any
    valid: Any  # None if all steps are.
    starts: Any  # Of a segment, or padding; None for one segment a row.


def _prepare(call, layout, init, carry_in, xs, segments, reverse, chunk=None) -> _Loop:
    """Puts time in front, and says what `f` gets at starts and at padding."""
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, layout.axis, 0), xs)
    rows, over = range(len(layout.batch_axes)), range(1, len(layout.batch_axes) + 1)
    layout = layout._replace(axis=0, batch_axes=tuple(over))
    _, size = layout.sizes(xs)
    steps = _steps.find_steps(call, segments, size, layout, reverse)
    if chunk and size % chunk and steps.valid is None:  # There will be padding.
        steps = steps._replace(valid=jnp.ones_like(steps.starts))
    init, carry_in, xs, steps = alike(
        call, (init, rows), (carry_in, rows), (xs, over), (steps, over)
    )
    valid, starts, first = steps
    if layout.kind == "padded":
        starts = None
    carry, padding = init if carry_in is None else carry_in, None
    if starts is not None and carry_in is not None:  # The first segment goes on.
        starts &= ~_steps.is_at(first, starts, 0)
    if valid is not None:
        some = (first >= 0)[0]
        lent = jax.tree.map(lambda c: _steps.lend(c, some, rows), carry)
        padding = _steps.select(some, carry, lent)
        if starts is not None and carry_in is None:  # Padding counts as a start.
            init, padding = padding, None
        first = jax.tree.map(lambda x: _steps.first_valid(x, first, layout)[0], xs)
        if chunk:  # The gradient saves xs, where `jax.debug_nans` must find no NaN.
            xs = jax.tree.map(lambda x: _steps.fill_padding(x, steps, layout), xs)
    if chunk:
        grow = partial(pad_to_multiple, axis=0, multiple=chunk)
        xs, valid = jax.tree.map(grow, (xs, valid))
        starts = jax.tree.map(partial(grow, value=True), starts)
    return _Loop(carry, init, padding, first, xs, valid, starts)


def _saving_little(fun: Any, *operands: Any) -> Any:
    # Otherwise the loop would save each mask as large as what it selects. The lambda is
    # new: `jax.checkpoint` keeps what it traces, as `jax.jit` does (see `compiled`).
    return jax.checkpoint(lambda *args: fun(*args), prevent_cse=False)(*operands)


_select = partial(_saving_little, _steps.select)
_zero_padding = partial(_saving_little, _steps.zero_padding)


def _run_loop(step: Any, loop: _Loop, *, reverse=False, unroll=1, chunk=None) -> Any:
    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, valid, starts = inputs
        now = carry
        if starts is not None:
            now = _select(starts, loop.init, now)
        if loop.padding is not None:
            now = _select(valid, now, loop.padding)
        if valid is None:
            return step(now, x)
        new, y = step(now, _select(valid, x, loop.first))
        return _select(valid, new, carry), _zero_padding(y, valid)

    scan = partial(lax.scan, body, reverse=reverse, unroll=unroll)
    inputs = loop.xs, loop.valid, loop.starts
    if chunk is None:
        return scan(loop.carry, inputs)

    def scan_chunk(carry: Any, some_and_inputs: Any) -> tuple[Any, Any]:
        some, *operands = some_and_inputs
        if some is None:
            return scan(carry, *operands)
        return _compat.run_if(some, scan, carry, *operands)

    count = jax.tree.leaves(inputs)[0].shape[0] // chunk
    cut = (count, chunk)
    inputs = jax.tree.map(lambda x: x.reshape(*cut, *x.shape[1:]), inputs)
    some = inputs[1]
    if some is not None:  # `f` may have collectives: all devices must decide alike.
        some = _compat.any_device(some.any(range(1, some.ndim)))
    scan_chunk = jax.checkpoint(scan_chunk, prevent_cse=False)
    carry, ys = lax.scan(scan_chunk, loop.carry, (some, inputs), reverse=reverse)
    return carry, jax.tree.map(lambda y: y.reshape(count * chunk, *y.shape[2:]), ys)


def scan_rows(f, init, carry_in, xs, segments, *, call, layout, reverse, unroll, chunk):
    """The program of `scan_segments`."""
    batch, size = layout.sizes(xs)
    loop = _prepare(call, layout, init, carry_in, xs, segments, reverse, chunk)
    step = check_step(call, f, batch)
    carry, ys = _run_loop(step, loop, reverse=reverse, unroll=unroll, chunk=chunk)
    ys = jax.tree.map(lambda y: y[:size], ys) if chunk else ys
    return carry, _outputs(call, ys, layout.axis)


def scan_both_ways(f, params, inits, xs, segments, *, call, layout, unroll):
    """The program of `bidirectional_scan`."""
    batch, _ = layout.sizes(xs)
    ways = [
        _prepare(call, layout, init, None, xs, segments, reverse)
        for init, reverse in zip(inits, (False, True), strict=True)
    ]
    # From the end to the start, so that one loop can step through both directions.
    over_time = dict(xs=ways[1].xs, valid=ways[1].valid, starts=ways[1].starts)
    ways[1] = ways[1]._replace(**jax.tree.map(_flip, over_time))
    axes: Any = _Loop(*[0] * 4, *[1] * 3)
    stacked = [
        jax.tree.map(lambda a, b, axis=axis: jnp.stack([a, b], axis), *fields)
        for *fields, axis in zip(*ways, axes, strict=True)
    ]

    def one_way(params: Any, loop: _Loop) -> Any:
        step = check_step(call, partial(f, params), batch)
        return _run_loop(step, loop, unroll=unroll)

    # vmap turns a loop over one direction into one loop over both.
    mapped = jax.vmap(one_way, (0, axes), (0, 1))
    params = jax.tree.map(lambda a, b: jnp.stack([a, b]), *params)
    carries, ys = mapped(params, _Loop(*stacked))
    outputs = [_one_way(ys, i, 1) for i in (0, 1)]
    outputs[1] = jax.tree.map(_flip, outputs[1])
    outputs = [_outputs(call, ys, layout.axis) for ys in outputs]
    return (_one_way(carries, 0), _one_way(carries, 1)), (outputs[0], outputs[1])


def _flip(x: jax.Array) -> jax.Array:
    return jnp.flip(x, 0)


def _one_way(tree: Any, i: int, axis: int = 0) -> Any:
    return jax.tree.map(lambda x: lax.index_in_dim(x, i, axis, keepdims=False), tree)


def _outputs(call: Call, ys: Any, axis: int) -> Any:
    """Puts the segment axis of time-major `ys` where `xs` has it."""

    def leaf(path: Any, y: jax.Array) -> jax.Array:
        if axis >= y.ndim:
            call.fail(
                f"the segment axis of xs is {axis}, but y{keystr(path)} of f has shape "
                f"{y.shape[1:]}, too few axes to put it there; move the segment axis "
                "of xs right after the batch axes."
            )
        return jnp.moveaxis(y, 0, axis)

    return tree_map_with_path(leaf, ys)

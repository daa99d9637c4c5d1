"""The parts of the three scans: valid steps, restarts, padding, one loop.

A step of the loop gives `f` the carry where the segment goes on, and `init` where it
starts and at padding. At padding, `f` also gets the first valid step of the row in
place of x, and its result is discarded. So `f` never sees an input that a loop over
valid steps would not give it, and padding cannot cause NaNs, not even in gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jax_revseg._arguments import Call
from jax_revseg._boundaries import shift
from jax_revseg._carry import alike
from jax_revseg._layout import Layout
from jax_revseg._linear import compiled
from jax_revseg._lowering import align, padding_mask
from jax_revseg._primitive import bind
from jax_revseg._segments import parse_arrays


class Rows(NamedTuple):
    """The arrays of a scan, and masks of shape `(*batch, T)` over their steps."""

    xs: Any
    layout: Layout  # Of each array in xs.
    valid: jax.Array
    keys: jax.Array | None  # They differ between neighbouring segments; None for masks.

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return self.valid.shape[:-1]

    def starts(self, reverse: bool) -> jax.Array:
        """Whether a step starts a segment, in this direction, or is padding."""
        return compiled(_starts, reverse)(self.valid, self.keys)


def parse_rows(
    call: Call, name: str, xs: Any, axis: int | None, **encodings: Any
) -> Rows:
    """Returns the arrays of the pytree `xs`, and the masks that its segments need."""
    xs, segments, layout = parse_arrays(call, name, xs, axis, **encodings)
    for path, x in tree_leaves_with_path(xs):
        _check_whole(call, f"{name}{keystr(path)}", x, layout.axis)
    if argument := {"ids": "segment_ids", "mask": "mask"}.get(layout.kind):
        _check_whole(call, argument, segments, segments.ndim - 1)
    first = jax.tree.leaves(xs)[0]
    masks = compiled(_masks, layout)(first, segments)
    batch = range(len(layout.batch_axes))
    xs, (valid, keys) = alike(call, (xs, layout.batch_axes), (masks, batch))
    return Rows(xs, layout, valid, keys)


def _check_whole(call: Call, name: str, array: Any, axis: int) -> None:
    over = jax.typeof(array).sharding.spec[axis]
    if over is not None:
        call.fail(
            f"axis {axis} of {name}, the segment axis, is sharded over mesh axis "
            f"{over!r}, but a scan runs along it; replicate that axis with "
            "jax.sharding.reshard."
        )


def _masks(layout, x, segments):
    if layout.kind == "mask":  # A masked step holds the carry.
        return segments, None
    size = x.shape[layout.axis]
    valid = ~padding_mask(segments, size, layout)
    if layout.kind == "ids":
        return valid, segments
    t = lax.broadcasted_iota(jnp.int32, valid.shape, valid.ndim - 1)
    batch_axes = tuple(range(valid.ndim - 1))
    positions = layout._replace(axis=valid.ndim - 1, batch_axes=batch_axes)
    # The source of a step plus the step is start + end - 1: one number a segment. Under
    # checkify this bind checks the lengths.
    return valid, t + bind(t, segments, positions)


def _starts(reverse, valid, keys):
    if keys is None:
        return ~valid
    by = -1 if reverse else 1
    # Each step looks at the next one, and the pad comes last: in an associative scan
    # XLA:CPU would compute a comparison again for each of its many users.
    next_valid, next_key = shift(valid, -by), shift(keys, -by)
    return shift(~next_valid | (keys != next_key), by, True)


def fill_padding(reverse: bool, layout: Layout, x: jax.Array, valid: jax.Array):
    """Replaces padding by the first valid step of the row, in the scan's direction."""
    if 0 in x.shape or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x  # Any key is as good as another.
    index = jnp.argmax(jnp.flip(valid, -1) if reverse else valid, -1, keepdims=True)
    index = valid.shape[-1] - 1 - index if reverse else index
    index = align(index, x.ndim, layout)
    first = jnp.take_along_axis(x, index, layout.axis, mode="promise_in_bounds")
    # Roots, logarithms and norms are smooth at 1/2, which a row without steps gets.
    some = align(valid.any(-1, keepdims=True), x.ndim, layout)
    first = lax.stop_gradient(jnp.where(some, first, jnp.full_like(first, 0.5)))
    return jnp.where(align(valid, x.ndim, layout), x, first)


def select(mask: jax.Array, a: Any, b: Any) -> Any:
    """Takes `a` in the rows where the mask is true, else `b`."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(lax.expand_dims(mask, range(mask.ndim, a.ndim)), a, b)

    return jax.tree.map(leaf, a, b)


def zero_padding(ys: jax.Array, valid: jax.Array) -> jax.Array:
    """Sets `ys` to zero at padding; keys have no zero."""
    if jnp.issubdtype(ys.dtype, jax.dtypes.extended):
        return ys
    return select(valid, ys, jnp.zeros_like(ys))


def loop(step: Any, unroll: Any, reverse: bool, init: Any, xs: Any, valid, starts):
    """Scans time-major arrays; returns the last carry of each row, and `ys`."""

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, valid, starts = inputs
        new, y = step(select(starts, init, carry), x)
        return select(valid, new, carry), y

    inputs = (xs, valid, starts)
    carry, ys = lax.scan(body, init, inputs, reverse=reverse, unroll=unroll)
    return carry, jax.tree.map(lambda y: compiled(zero_padding)(y, valid), ys)


def inputs(rows: Rows, reverse: bool) -> tuple[Any, jax.Array, jax.Array]:
    """Time-major arrays without padding, and the two masks."""
    batch = tuple(range(1, len(rows.batch) + 1))
    layout = Layout("mask", 0, batch)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, rows.layout.axis, 0), rows.xs)
    fill = compiled(fill_padding, reverse, layout)
    xs = jax.tree.map(lambda x: fill(x, rows.valid), xs)
    valid, starts = rows.valid, rows.starts(reverse)
    return xs, jnp.moveaxis(valid, -1, 0), jnp.moveaxis(starts, -1, 0)


def restore_axis(call: Call, ys: Any, axis: int) -> Any:
    """Moves the segment axis of time-major `ys` to where `xs` has it."""

    def leaf(path: Any, y: jax.Array) -> jax.Array:
        if axis >= y.ndim:
            call.fail(
                f"the segment axis of xs is {axis}, but y{keystr(path)} of f has shape "
                f"{y.shape[1:]}, too few axes to put it there; move the segment axis "
                "of xs right after the batch axes."
            )
        return jnp.moveaxis(y, 0, axis)

    return tree_map_with_path(leaf, ys)


def combine(call: Call, fn: Any, a: Any, b: Any) -> Any:
    """Combines pairs (whether a segment starts within, value) by `fn`."""
    (starts_a, a), (starts_b, b) = a, b
    # fn gets b twice where a belongs to another segment: an infinity in a would
    # otherwise give NaN gradients, although the result is discarded.
    out = fn(select(starts_b, b, a), b)
    describe = partial(jax.tree.map, lambda x: f"{jnp.result_type(x)}{np.shape(x)}")
    if jax.tree.flatten(describe(out)) != jax.tree.flatten(describe(b)):
        call.fail(
            f"fn was given {describe(b)}, but returned {describe(out)}; it must return "
            "the structure, shapes and dtypes of elems.",
            TypeError,
        )
    return starts_a | starts_b, select(starts_b, b, out)

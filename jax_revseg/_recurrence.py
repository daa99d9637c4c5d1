"""The parts of the three scans: valid steps, restarts, padding, checks, one loop.

A step of the loop gives `f` the carry where the segment goes on, and `init` where it
starts and at padding. At padding, `f` also gets the first valid step of the row in
place of x, and its result is discarded. So `f` never sees an input that a loop over
valid steps would not give it, and padding cannot cause NaNs, not even in gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jax_revseg import _compat
from jax_revseg._arguments import Call
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
    keys: jax.Array | None  # Equal in all steps of a segment; None: one a row.

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return self.valid.shape[:-1]

    def goes_on(self, reverse: bool) -> jax.Array:
        """Whether a step takes the carry of the step before it, in this direction."""
        if self.keys is None:
            return self.valid
        return compiled(_goes_on, reverse)(self.valid, self.keys)


def parse_rows(
    call: Call, name: str, xs: Any, axis: int | None, **encodings: Any
) -> Rows:
    """Returns the arrays of the pytree `xs`, and the masks that its segments need."""
    xs, segments, layout = parse_arrays(call, name, xs, axis, **encodings)
    first = jax.tree.leaves(xs)[0]
    valid, keys = compiled(_masks, layout)(first, segments)
    return Rows(xs, layout, valid, keys)


def _masks(layout, x, segments):
    if layout.kind == "mask":  # A masked step holds the carry.
        return segments, None
    size = x.shape[layout.axis]
    valid = ~padding_mask(segments, size, layout)
    t = lax.broadcasted_iota(jnp.int32, valid.shape, valid.ndim - 1)
    batch_axes = tuple(range(valid.ndim - 1))
    positions = layout._replace(axis=valid.ndim - 1, batch_axes=batch_axes)
    # The source of a step plus the step is start + end - 1: one number a segment. Under
    # checkify this bind checks the lengths.
    return valid, t + bind(t, segments, positions)


def _goes_on(reverse, valid, keys):
    # The roll compares the first step with the last, which does no harm: before the
    # first step the carry is init.
    return valid & (keys == jnp.roll(keys, -1 if reverse else 1, -1))


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


def time_major(rows: Rows, mask: jax.Array) -> jax.Array:
    """Moves the last axis of a mask to the front."""
    return jnp.moveaxis(mask, -1, 0)


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


def carry_arrays(call: Call, name: str, init: Any, batch: tuple[int, ...]) -> Any:
    """Returns `init` as a pytree of arrays that start with the batch axes."""

    def leaf(path: Any, value: Any) -> jax.Array:
        array = leaf_array(call, f"{name}{keystr(path)}", value)
        check_batch(call, f"{name}{keystr(path)}", array, batch)
        return array

    return tree_map_with_path(leaf, init)


def leaf_array(call: Call, name: str, value: Any) -> jax.Array:
    """Returns a leaf as an array that is not weakly typed: a loop keeps its types."""
    try:
        array = jnp.asarray(value)
    except TypeError:
        call.fail(
            f"{name} is {value!r} of type {type(value).__name__}, but must be an array; "
            "close over anything else in f.",
            TypeError,
        )
    return jnp.asarray(array, array.dtype)


def check_batch(call: Call, name: str, array: Any, batch: tuple[int, ...]) -> None:
    """Raises if an array does not start with the batch axes."""
    if jnp.shape(array)[: len(batch)] != batch:
        call.fail(
            f"{name} has shape {jnp.shape(array)}, but its first axes must be the batch "
            f"axes {batch}, one entry for each row; use jax.numpy.broadcast_to if all "
            "rows are equal."
        )


def checked(call: Call, f: Callable[..., Any], batch: tuple[int, ...]):
    """Wraps `f(carry, x)`: raises if its result is no pair, or the carry changes."""

    def describe(leaf: Any) -> str:
        return str(jax.typeof(leaf).update(weak_type=False))

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        out = f(carry, x)
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            call.fail(
                f"f must return a pair (carry, y), but returned {type(out).__name__}"
                f"{f' of {len(out)}' if isinstance(out, (tuple, list)) else ''}; return "
                "(carry, None) if there is no y.",
                TypeError,
            )
        new, y = out
        got, want = jax.tree.map(describe, new), jax.tree.map(describe, carry)
        if jax.tree.flatten(got) != jax.tree.flatten(want):
            call.fail(
                f"f was given a carry of {want}, but returned one of {got}; make init "
                "and what f returns equal in structure, shapes and dtypes (and in "
                "sharding: see jax.lax.pcast and jax.sharding.reshard).",
                TypeError,
            )
        for path, leaf in tree_leaves_with_path(y):
            check_batch(call, f"y{keystr(path)} of f", leaf, batch)
        return new, y

    return step


def loop(step: Any, unroll: Any, reverse: bool, init: Any, xs: Any, valid, goes_on):
    """Scans time-major arrays; returns the last carry of each row, and `ys`."""

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, valid, goes_on = inputs
        new, y = step(select(goes_on, carry, init), x)
        return select(valid, new, carry), y

    inputs = (xs, valid, goes_on)
    carry, ys = lax.scan(body, init, inputs, reverse=reverse, unroll=unroll)
    return carry, jax.tree.map(lambda y: compiled(zero_padding)(y, valid), ys)


def check_unroll(call: Call, unroll: Any) -> None:
    """Raises if `unroll` is not what `lax.scan` takes."""
    if not isinstance(unroll, bool) and call.integer("unroll", unroll) < 1:
        call.fail(f"unroll is {unroll}; use 1 or more, or True.")


def alike(call: Call, *trees: tuple[Any, Sequence[int]]) -> list[Any]:
    """Gives the batch axes of all arrays one sharding, and one set of varying axes.

    A loop must return the types that it takes, and from the first step on its carry
    varies, and is sharded, as its inputs are. Each tree comes with its batch axes.
    """
    arrays = [leaf for tree, _ in trees for leaf in jax.tree.leaves(tree)]
    pairs = [(leaf, axes) for tree, axes in trees for leaf in jax.tree.leaves(tree)]
    target = _merged_batch_sharding(call, pairs)

    def leaf(x: jax.Array, axes: Sequence[int]) -> jax.Array:
        x = _compat.vary_like(x, *arrays)
        if target is None:
            return x
        spec = list(jax.typeof(x).sharding.spec)
        for a, name in zip(axes, target.spec, strict=True):
            spec[a] = name
        return _compat.reshard_to(x, NamedSharding(target.mesh, PartitionSpec(*spec)))

    return [jax.tree.map(lambda x, a=axes: leaf(x, a), tree) for tree, axes in trees]


def _merged_batch_sharding(call: Call, pairs: Any) -> NamedSharding | None:
    meshes = [jax.typeof(x).sharding.mesh for x, _ in pairs]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return None
    merged: list[Any] = [None] * len(pairs[0][1])
    for x, axes in pairs:
        for i, a in enumerate(axes):
            name = jax.typeof(x).sharding.spec[a]
            if None not in (name, merged[i]) and name != merged[i]:
                call.fail(
                    f"batch axis {i} is sharded over {merged[i]!r} in one array and "
                    f"over {name!r} in another; use jax.sharding.reshard."
                )
            merged[i] = merged[i] or name
    return NamedSharding(mesh, PartitionSpec(*merged))

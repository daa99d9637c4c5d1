"""Both directions of a recurrent layer over ragged rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_map_with_path

from jax_revseg._api import reverse_rows
from jax_revseg._arguments import AxisName, BatchAxis, Call, Integers
from jax_revseg._carry import alike, check_callable
from jax_revseg._linear import compiled
from jax_revseg._lowering import gather_rows, with_features
from jax_revseg._segments import parse_arrays
from jax_revseg._steps import fill_padding, find_steps, zero_padding


def concatenate(forward: Any, backward: Any) -> Any:
    """Concatenates the last axes of two results."""
    trees = [jax.tree.structure(tree) for tree in (forward, backward)]
    if trees[0] != trees[1]:
        raise ValueError(
            f"bidirectional: forward returned the structure {trees[0]} and backward "
            f"{trees[1]}, which cannot be concatenated; give a merge of your own."
        )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), forward, backward)


def bidirectional(
    forward: Callable[[Any], Any],
    backward: Callable[[Any], Any],
    x: Any,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    starts: Any = None,
    mask: Any = None,
    padding_id: int | None = None,
    axis: int | None = None,
    batch_axis: BatchAxis = None,
    axis_name: AxisName | None = None,
    merge: Callable[[Any, Any], Any] = concatenate,
) -> Any:
    """Runs two layers over ragged rows, one forward and one backward.

    Returns `merge(forward(x), reverse(backward(reverse(x))))`. The backward layer gets
    the valid steps of each segment from the last to the first, and its outputs return
    to the order of `x`.

    With `lengths` or `mask` each layer gets the valid steps of a row first, in order,
    and then a valid step again and again in place of padding. So padding, even NaN,
    never affects valid outputs or gradients, and every layer that only runs forward is
    right. With `lengths` the outputs at padding are whatever the layers return there:
    mask them where they matter. With `mask` (left padding, holes) they are zero.

    With `segment_ids`, `cu_seqlens` or `starts` segments keep their places, so the same
    ids serve both directions: give them to layers that restart at segments, as packed
    state space models do. Any other layer carries its state from one segment to the
    next, and reads padding.

    Args:
        forward: Function of `x` that returns an array or a pytree of arrays, each with
            the batch and segment axes of `x`. Return only outputs, no final carry: for
            final states use `scan_segments` or `bidirectional_scan`. A final carry
            whose sizes at these axes happen to equal those of `x` is not noticed, and
            comes back reversed.
        backward: The same, for the other direction.
        x: Array or pytree of arrays of any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `batch`, in steps: one segment a row, from position
            0, clipped to `[0, T]`. Exactly one encoding of the segments is given.
        segment_ids: Integers, one for each position; `(*batch, T)` by default. Every
            maximal run of equal ids is a segment.
        cu_seqlens: Integers of shape `(*batch, K + 1)`: cumulative offsets from 0.
        starts: Booleans that lie like `segment_ids`, true at the first step of each
            segment.
        mask: Booleans that lie like `segment_ids`, true at valid steps: one segment a
            row, which may have holes.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
        axis: The segment axis of `x`. The default is the axis right after the batch
            axes; 0 is time-major.
        batch_axis: The axes of `x` that go with the batch axes of the encoding. The
            default is the first axes other than `axis`.
        axis_name: Inside `jax.shard_map`, the mesh axis over which the segment axis is
            sharded. The layers get local blocks and must pass their state between
            devices.
        merge: Function of the two results. The default concatenates the last axes.

    Returns:
        What `merge` returns.

    Raises:
        TypeError: A layer or `merge` is no function, or as `reverse_segments`.
        ValueError: An output lacks the batch and segment axes of `x`, or has no axis
            beyond them to concatenate, the two results differ in structure, or as
            `reverse_segments`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import bidirectional
        >>> sums = lambda x: jnp.cumsum(x, 1)
        >>> x = jnp.array([[[1], [2], [3], [9]]])
        >>> bidirectional(sums, sums, x, jnp.array([3]))[:, :3]
        Array([[[1, 6],
                [3, 5],
                [6, 3]]], dtype=int32)

    Source: M. Schuster, K. K. Paliwal, "Bidirectional recurrent neural networks", IEEE
    Transactions on Signal Processing 45 (1997), for ragged rows as in
    `tf.keras.layers.Bidirectional` and Flax's `Bidirectional`.
    """
    call = Call("bidirectional", "x", axis_name)
    layers = {"forward": forward, "backward": backward}
    for name, function in (layers | {"merge": merge}).items():
        remedy = ", such as jax.numpy.add" if name == "merge" else " of x"
        check_callable(call, name, function, remedy)
    if merge in (sum, jnp.concatenate):
        call.fail(
            f"merge is {merge.__name__}, which does not take two results; use "
            "jax.numpy.add, or leave merge out to concatenate the last axes."
        )
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    encodings.update(starts=starts, mask=mask, padding_id=padding_id)
    x, segments, layout = parse_arrays(call, "x", x, axis, batch_axis, **encodings)
    # Both layers get the sharding that the reversal gives to its result.
    rows = range(len(layout.batch_axes))
    x = next(alike(call, (x, layout.batch_axes), (segments, rows)))
    shape = jax.tree.leaves(x)[0].shape
    given, original = segments, layout
    if mask is not None:
        if axis_name is not None:
            call.fail(
                f"mask and axis_name={axis_name!r} are both given, but valid steps "
                "would move from device to device; give lengths or segment_ids."
            )
        x = jax.tree.map(lambda a: _to_front(a, given, layout=original), x)
        segments, layout = _counts(given), layout._replace(kind="padded")
    if layout.kind == "padded":
        fill = partial(_fill, call=call, layout=layout)
        x = jax.tree.map(lambda leaf: fill(leaf, segments), x)

    def reverse(tree: Any) -> Any:
        return jax.tree.map(lambda a: reverse_rows(call, a, segments, layout), tree)

    def run(name: str, inputs: Any) -> Any:
        check = partial(_check_output, call, layout, shape, merge is concatenate, name)
        return tree_map_with_path(check, layers[name](inputs))

    results = run("forward", x), reverse(run("backward", reverse(x)))
    if mask is not None:
        results = jax.tree.map(lambda y: _back(y, given, layout=original), results)
    return merge(*results)


def _check_output(call, layout, x_shape, concatenated, name, path, y) -> jax.Array:
    axes, shape = (*layout.batch_axes, layout.axis), np.shape(y)
    sizes = tuple(x_shape[a] for a in axes)
    if len(shape) <= max(axes) or tuple(shape[a] for a in axes) != sizes:
        call.fail(
            f"{name} returned output{keystr(path)} of shape {shape}, but every "
            f"output must have sizes {sizes} at axes {axes}, as x has; return only "
            "the outputs, and for final states use scan_segments or bidirectional_scan"
            f"{'; give a mask or ids as mask= or segment_ids=' * (len(axes) > 2)}."
        )
    if concatenated and len(shape) == len(axes):
        call.fail(
            f"{name} returned output{keystr(path)} of shape {shape}, which has no axis "
            f"beyond the batch and segment axes {axes} to concatenate; return one with "
            "y[..., None], or pass a merge such as jax.numpy.add."
        )
    return y


@compiled
def _fill(x, segments, *, call, layout):
    steps = find_steps(call, segments, x.shape[layout.axis], layout)
    return fill_padding(x, steps, layout)


@compiled
def _to_front(x, mask, *, layout):
    """Moves the valid steps of each row to its front."""
    mask = jnp.moveaxis(mask, -1, at := layout.time_axis)
    return gather_rows(x, jnp.argsort(~mask, at), layout)


@compiled
def _back(y, mask, *, layout):
    """Moves steps from the front back to where they are valid."""
    mask = jnp.moveaxis(mask, -1, at := layout.time_axis)
    rank = lax.cumsum(mask.astype(jnp.int32), at)
    y = gather_rows(y, jnp.maximum(rank - 1, 0), layout)
    return zero_padding(y, with_features(mask, y.ndim, layout))


@compiled
def _counts(mask):
    return jnp.sum(mask, -1, dtype=jnp.int32)

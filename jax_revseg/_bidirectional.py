"""Both directions of a recurrent layer over ragged rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_revseg._api import reverse_sequence
from jax_revseg._layout import BatchAxis, Integers, as_array, padded
from jax_revseg._sequence import AxisName, axis_size


def _concatenate(forward: Any, backward: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), forward, backward)


def bidirectional(
    forward: Callable[[Any], Any],
    backward: Callable[[Any], Any],
    *,
    merge: Callable[[Any, Any], Any] = _concatenate,
) -> Callable[..., Any]:
    """Makes a bidirectional layer out of two that run forward.

    `run(x, lengths)` is `merge(forward(x), reverse(backward(reverse(x))))`, where
    `reverse` is `reverse_sequence`: the backward layer sees each row's valid steps from
    the last to the first, and its outputs come back in the order of `x`. Neither layer
    sees padding before a valid step. What the layers give at padding stays there: mask
    it where it matters.

    Args:
        forward: Function of `x` that returns an array or a pytree of arrays, each with
            the batch and segment axes of `x`. A layer that wants the lengths too gets
            them by `functools.partial`.
        backward: The same, for the other direction.
        merge: Function of the two results. The default concatenates the last axes.

    Returns:
        A function `run(x, lengths, *, axis=None, batch_axis=None, axis_name=None)`. Its
        `x` is an array or a pytree of arrays; its other arguments are those of
        `reverse_sequence`, and it raises what that raises. With `axis_name`, `forward`
        and `backward` get local blocks and must pass their state between devices.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import bidirectional
        >>> sums = bidirectional(lambda x: jnp.cumsum(x, 1), lambda x: jnp.cumsum(x, 1))
        >>> sums(jnp.array([[[1], [2], [3], [9]]]), jnp.array([3]))[..., :3, :]
        Array([[[1, 6],
                [3, 5],
                [6, 3]]], dtype=int32)

    Source: M. Schuster, K. K. Paliwal, "Bidirectional recurrent neural networks", IEEE
    Transactions on Signal Processing 45 (1997), for ragged rows as in
    `tf.keras.layers.Bidirectional` and Flax's `Bidirectional`.
    """

    def run(
        x: Any,
        lengths: Integers,
        *,
        axis: int | None = None,
        batch_axis: BatchAxis = None,
        axis_name: AxisName | None = None,
    ) -> Any:
        leaves = [as_array("bidirectional", leaf) for leaf in jax.tree.leaves(x)]
        if not leaves:
            raise ValueError(
                f"bidirectional: x is {x!r}, a pytree with no array in it; give at "
                "least 1 array."
            )
        # The outputs may have another rank than x, so that an axis counted from the end
        # would be another one.
        blocks = axis_size("bidirectional", axis_name)
        segments = padded("bidirectional", leaves[0], lengths, axis, batch_axis, blocks)

        def reverse(tree: Any) -> Any:
            return jax.tree.map(
                lambda leaf: reverse_sequence(
                    leaf,
                    segments.values,
                    axis=segments.axis,
                    batch_axis=segments.batch_axes,
                    axis_name=axis_name,
                ),
                tree,
            )

        return merge(forward(x), reverse(backward(reverse(x))))

    return run

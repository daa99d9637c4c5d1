"""Both directions of a recurrent layer over ragged rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, register_pytree_with_keys_class

from jax_revseg._api import reverse_rows
from jax_revseg._arguments import AxisName, BatchAxis, Call, Integers
from jax_revseg._carry import alike
from jax_revseg._segments import parse_arrays


def _concatenate(forward: Any, backward: Any) -> Any:
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
    *,
    merge: Callable[[Any, Any], Any] = _concatenate,
) -> Bidirectional:
    """Makes a bidirectional layer from two layers that run forward.

    `run(x, lengths)` is `merge(forward(x), reverse(backward(reverse(x))))`. The
    backward layer gets the valid steps of each segment from the last to the first, and
    its outputs return to the order of `x`. With one length a row, both layers process
    all valid steps before any padding, so padding cannot affect valid outputs. The
    outputs at padding are whatever the layers return there: mask them where they
    matter.

    With `segment_ids` or `cu_seqlens` segments keep their places, so the same ids serve
    both directions: give them to layers that restart at segments, as packed state
    space models do.

    The result is a pytree with `forward` and `backward` as children. So it can be a
    field of an Equinox module or an attribute of an NNX module: its layers train, are
    counted, saved and restored. In Haiku and Linen, call `bidirectional` where the
    layers are called. A plain function is static, and the parameters that it closes
    over are constants: to train them, pass `jax.tree_util.Partial(f, params)`. The
    result can be pickled where its layers can.

    Args:
        forward: Function of `x` that returns an array or a pytree of arrays, each with
            the batch and segment axes of `x`. Return only outputs, no final carry: for
            final states use `scan_segments` or `bidirectional_scan`. A final carry
            whose sizes at these axes happen to equal those of `x` is not noticed, and
            comes back reversed.
        backward: The same, for the other direction.
        merge: Function of the two results. The default concatenates the last axes.

    Returns:
        A callable `run(x, lengths=None, *, segment_ids=None, cu_seqlens=None,
        padding_id=None, axis=None, batch_axis=None, axis_name=None)`. `x` is an array
        or a pytree of arrays; `lengths` has one length for each row, as in
        `reverse_sequence`; the other arguments are those of `reverse_segments`. With
        `axis_name` the layers get local blocks and must pass their state between
        devices.

    Raises:
        ValueError: From `run`: an output lacks the batch and segment axes of `x`, the
            two results differ in structure, or as `reverse_segments`.

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
    # An NNX module accepts layers in an attribute only if its type is registered, or
    # in `nnx.data(...)`. If the layers are NNX modules, `flax.nnx` is imported already.
    register = getattr(sys.modules.get("flax.nnx"), "register_data_type", None)
    if register is not None:
        register(Bidirectional)
    return Bidirectional(forward, backward, merge)


@register_pytree_with_keys_class
@dataclass(eq=False)
class Bidirectional:
    """A bidirectional layer: see `bidirectional`."""

    forward: Any
    backward: Any
    merge: Any

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Children are layers with leaves; a plain function is static."""
        layers = {"forward": self.forward, "backward": self.backward}
        functions = (FunctionType, BuiltinFunctionType)
        static = {k: v for k, v in layers.items() if isinstance(v, functions)}
        children = [
            (jax.tree_util.GetAttrKey(k), v)
            for k, v in layers.items()
            if k not in static
        ]
        return children, (tuple(static.items()), self.merge)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Bidirectional:
        """Undoes `tree_flatten_with_keys`."""
        static, children = dict(aux[0]), iter(children)
        forward, backward = (
            static[name] if name in static else next(children)
            for name in ("forward", "backward")
        )
        return cls(forward, backward, aux[1])

    def __call__(
        self,
        x: Any,
        lengths: Integers | None = None,
        *,
        segment_ids: Integers | None = None,
        cu_seqlens: Integers | None = None,
        padding_id: int | None = None,
        axis: int | None = None,
        batch_axis: BatchAxis = None,
        axis_name: AxisName | None = None,
    ) -> Any:
        """Runs both layers over `x`."""
        call = Call("bidirectional", "x", axis_name)
        x, segments, layout = parse_arrays(
            call,
            "x",
            x,
            axis,
            batch_axis,
            padding_id=padding_id,
            lengths=lengths,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
        )
        # Both layers get the sharding that the reversal gives to its result.
        batch = range(len(layout.batch_axes))
        x, _ = alike(call, (x, layout.batch_axes), (segments, batch))
        first = jax.tree.leaves(x)[0]
        axes = (*layout.batch_axes, layout.axis)
        sizes = tuple(first.shape[a] for a in axes)

        def output(name: str, path: Any, y: Any) -> jax.Array:
            shape = np.shape(y)
            if len(shape) <= max(axes) or tuple(shape[a] for a in axes) != sizes:
                call.fail(
                    f"{name} returned output{keystr(path)} of shape {shape}, but every "
                    f"output must have sizes {sizes} at axes {axes}, as x has; return "
                    "only the outputs, and for final states use scan_segments or "
                    "bidirectional_scan."
                )
            return y

        def reverse(tree: Any) -> Any:
            return jax.tree.map(lambda a: reverse_rows(call, a, segments, layout), tree)

        results = []
        for name, layer, inputs in (
            ("forward", self.forward, x),
            ("backward", self.backward, reverse(x)),
        ):
            check = partial(output, name)
            results.append(jax.tree_util.tree_map_with_path(check, layer(inputs)))
        return self.merge(results[0], reverse(results[1]))

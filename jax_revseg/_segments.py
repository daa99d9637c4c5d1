"""From the encoding of a call, such as `lengths`, to `(segments, Layout)`, checked.

Values in JAX arrays are not checked: that would block until the device has computed
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jax_revseg._arguments import BatchAxis, Call
from jax_revseg._host_values import HostValues
from jax_revseg._layout import Kind, Layout
from jax_revseg._linear import compiled

_KINDS: dict[str, Kind] = {"segment_ids": "ids", "cu_seqlens": "packed", "mask": "mask"}


def parse_segments(
    call: Call,
    x: jax.Array,
    axis: int | None,
    batch_axis: BatchAxis = None,
    *,
    lengths_kind: Kind = "padded",
    padding_id: int | None = None,
    **encodings: Any,
) -> tuple[Any, Layout]:
    """Returns the segments, from the one encoding that is given, and their layout."""
    given = encodings
    if len(encodings) > 1:
        given = {name: value for name, value in encodings.items() if value is not None}
    if len(given) != 1:
        call.fail(
            f"got {' and '.join(given) or 'none'} of {', '.join(encodings)}; give "
            "exactly one of them."
        )
    ((name, encoding),) = given.items()
    if padding_id is not None:
        if name != "segment_ids":
            call.fail(
                f"padding_id is {padding_id!r}, but the segments are given by {name}; "
                "padding_id goes with segment_ids only: leave it out."
            )
        padding_id = call.integer("padding_id", padding_id)
    devices = call.devices  # Raises for a bad axis_name.
    kind = lengths_kind if name == "lengths" else _KINDS[name]
    parse = call.booleans if kind == "mask" else call.integers
    values = parse(name, encoding)
    if axis is not None:
        axis = call.integer("axis", axis)
    if batch_axis is not None:
        axes = batch_axis if isinstance(batch_axis, (tuple, list)) else (batch_axis,)
        batch_axis = tuple(call.integer("batch_axis", a) for a in axes)
    layout = _layout(call, x.shape, name, kind, values.shape, axis, batch_axis)
    if kind == "ids":
        layout = layout._replace(padding_id=padding_id)
    if not isinstance(values, jax.Array):
        return HostValues(call, x.shape, name, values, layout, devices).checked()
    if name == "cu_seqlens":
        return compiled(_differences)(values), layout
    if padding_id is not None:
        info = jnp.iinfo(values.dtype)
        if not info.min <= padding_id <= info.max:
            call.fail(
                f"padding_id is {padding_id}, but segment_ids has dtype "
                f"{values.dtype}, which holds {info.min} to {info.max}; use another "
                "padding_id or another dtype."
            )
    return values, layout


def parse_arrays(
    call: Call,
    name: str,
    tree: Any,
    axis: int | None,
    batch_axis: BatchAxis = None,
    **encodings: Any,
) -> tuple[Any, Any, Layout]:
    """Returns the arrays of a pytree, which share their segments and their axes."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves:
        call.fail(f"{name} is {tree!r}, a pytree without an array; give at least 1.")
    arrays, found = [], {}
    for path, leaf in leaves:
        leaf_call = call._replace(x_name=f"{name}{jax.tree_util.keystr(path)}")
        array = leaf_call.array(leaf)
        segments, layout = parse_segments(
            leaf_call, array, axis, batch_axis, **encodings
        )
        arrays.append(array)
        shape = f"{leaf_call.x_name} has shape {array.shape}"
        found[layout, array.shape[layout.axis]] = (segments, shape)
    if len(found) > 1:
        call.fail(
            f"the arrays disagree about the segment axis: "
            f"{' and '.join(shape for _, shape in found.values())}; give them the same "
            "axes, and count axis from the start."
        )
    (((layout, _), (segments, _)),) = found.items()
    return treedef.unflatten(arrays), segments, layout


@lru_cache(maxsize=4096)  # Otherwise a fifth of the time of an eager call.
def _layout(
    call: Call,
    x_shape: tuple[int, ...],
    name: str,
    kind: Kind,
    shape: tuple[int, ...],
    axis: int | None,
    batch_axis: tuple[int, ...] | None,
) -> Layout:
    return _Shapes(call, x_shape, name, kind, shape).layout(axis, batch_axis)


class _Shapes(NamedTuple):
    """The shapes of `x` and of the encoding called `name`."""

    call: Call
    x_shape: tuple[int, ...]
    name: str
    kind: Kind
    shape: tuple[int, ...]

    def layout(self, axis: int | None, batch_axis: tuple[int, ...] | None) -> Layout:
        """Counts all axes from 0, and compares the shapes."""
        x_shape, x_name, ndim = self.x_shape, self.call.x_name, len(self.x_shape)
        shape = self.shape
        if self.name == "cu_seqlens" and shape[-1:] == (0,):
            self._disagree(
                "the last axis of cu_seqlens needs at least 1 entry, the leading 0; K "
                "segments take K + 1 offsets"
            )
        batch_rank = len(shape) - (self.kind != "padded")
        if batch_rank < 0:
            self._disagree(
                f"{self.name} needs at least 1 axis, the one that runs over the "
                "segments; for one length a row use reverse_sequence"
            )
        self._refuse_a_batch(axis)
        axis = batch_rank if axis is None else self._canonical("axis", axis)
        if batch_axis is None:
            batch_axes = tuple(a for a in range(ndim) if a != axis)[:batch_rank]
        else:
            batch_axes = tuple(self._canonical("batch_axis", a) for a in batch_axis)
        if axis >= ndim or len(batch_axes) != batch_rank:
            self._disagree(
                f"{self.name} has {batch_rank} batch axes, but {x_name} (rank {ndim}) "
                f"has batch axes {batch_axes} beside axis {axis}; give one entry for "
                "each row, or name the axes with axis and batch_axis"
            )
        if len({*batch_axes, axis}) != batch_rank + 1:
            self.call.fail(
                f"batch_axis {batch_axis} and axis {axis} must name different axes of "
                f"{x_name} (shape {x_shape}); give axis and batch_axis explicitly."
            )
        sizes = tuple(x_shape[a] for a in batch_axes)
        if shape[:batch_rank] != sizes:
            self._disagree(self._other_sizes(sizes, axis, batch_axes))
        if self.kind in ("ids", "mask") and shape[-1] != x_shape[axis]:
            self._disagree(
                f"axis {axis} of {x_name} has size {x_shape[axis]}, so {self.name} "
                f"needs that many entries a row, one for each position, but has "
                f"{shape[-1]}"
            )
        return Layout(self.kind, axis, batch_axes)

    def _refuse_a_batch(self, axis: int | None) -> None:
        """Raises where axis 0, the segment axis by default, looks like a batch axis."""
        if self.kind == "packed" and axis is None and len(self.shape) == 1:
            count = self.shape[0] - (self.name == "cu_seqlens")
            if count > 1 and len(self.x_shape) > 1 and self.x_shape[0] == count:
                self._disagree(
                    f"{count} segments along axis 0 of size {count}; use "
                    "reverse_sequence for one length a row, give batch axes to "
                    f"{self.name} for several, or pass axis=0 if that is right"
                )

    def _canonical(self, argument: str, value: int) -> int:
        ndim = len(self.x_shape)
        if not -ndim <= value < ndim:
            self.call.fail(
                f"{argument} is {value}, but {self.call.x_name} has rank {ndim} (shape "
                f"{self.x_shape}); use a value from {-ndim} to {ndim - 1}."
            )
        return value % ndim

    def _disagree(self, why: str) -> NoReturn:
        self.call.fail(
            f"{self.name} has shape {self.shape} and {self.call.x_name} has shape "
            f"{self.x_shape}: {why}."
        )

    def _other_sizes(self, sizes: Any, axis: int, batch_axes: Any) -> str:
        batch = self.shape[: len(sizes)]
        remedy = "give one entry for each row, or name the axes with axis"
        if axis == len(sizes) and self.x_shape[1 : axis + 1] == batch:
            remedy = f"if {self.call.x_name} is time-major, use axis=0"
            if self.kind in ("ids", "mask"):
                remedy += f" ({self.name} stays batch-major)"
        return (
            f"the batch axes {batch_axes} of {self.call.x_name} have sizes {sizes}, "
            f"but {self.name} has {batch}; {remedy}"
        )


def _differences(offsets: jax.Array) -> jax.Array:
    """Subtracts neighbouring offsets exactly, also where a difference would wrap."""
    bits = max(jnp.iinfo(offsets.dtype).bits, 32)
    if jnp.iinfo(offsets.dtype).bits < 32:
        offsets = offsets.astype(jnp.int32)
    start, end = offsets[..., :-1], offsets[..., 1:]
    low, high = jnp.minimum(start, end), jnp.maximum(start, end)
    lengths = high.astype(f"uint{bits}") - low.astype(f"uint{bits}")
    lengths = jnp.minimum(lengths, jnp.iinfo(f"int{bits}").max).astype(f"int{bits}")
    return jnp.where(end < start, -lengths, lengths)

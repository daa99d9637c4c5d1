"""From the encoding of a call, such as `lengths`, to `(segments, Layout)`, checked.

Values in JAX arrays are not checked: that would block until the device has computed
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jax_revseg import _compat
from jax_revseg._arguments import BatchAxis, Call
from jax_revseg._host_values import HostValues
from jax_revseg._layout import Kind, Layout
from jax_revseg._linear import compiled

_KINDS: dict[str, Kind] = {
    "segment_ids": "ids",
    "cu_seqlens": "packed",
    "starts": "starts",
    "mask": "mask",
}


def parse_segments(
    call: Call, x: jax.Array, axis: Any, batch_axis: Any = None, **encodings: Any
) -> tuple[Any, Layout]:
    """Returns the segments, from the one encoding that is given, and their layout."""
    name, kind, values, *axes = _parse(call, axis, batch_axis, **encodings)
    layout = _layout(call, x.shape, name, kind, values.shape, *axes)
    return _segments(call, x.shape, name, values, layout)


def parse_arrays(
    call: Call, name: str, tree: Any, axis: Any, batch_axis: Any = None, **more: Any
) -> tuple[Any, Any, Layout]:
    """Returns the arrays of a pytree, which share their segments and their axes."""
    leaves, treedef = tree_flatten_with_path(tree)
    if not leaves:
        call.fail(f"{name} is {tree!r}, a pytree without an array; give at least 1.")
    if type(tree).__name__ == "PackedSequence":  # PyTorch's, a named tuple.
        call._replace(x_name=name).array(tree)
    encoding, kind, values, *axes = _parse(call, axis, batch_axis, **more)
    arrays, found = [], {}
    for path, leaf in leaves:
        of_leaf = call._replace(x_name=f"{name}{keystr(path)}")
        arrays.append(x := of_leaf.array(leaf))
        layout = _layout(of_leaf, x.shape, encoding, kind, values.shape, *axes)
        found.setdefault((layout, x.shape[layout.axis]), (of_leaf, x.shape))
    if len(found) > 1:
        shapes = [f"{c.x_name} has shape {shape}" for c, shape in found.values()]
        call.fail(
            f"the arrays disagree about the segment axis: {' and '.join(shapes)}; give "
            "them the same axes, and count axis from the start."
        )
    [((layout, _), (call, shape))] = found.items()
    segments, layout = _segments(call, shape, encoding, values, layout)
    return treedef.unflatten(arrays), segments, layout


def _parse(
    call: Call,
    axis: int | None,
    batch_axis: BatchAxis,
    padding_id: int | None = None,
    lengths_kind: Kind = "padded",
    **encodings: Any,
) -> tuple[str, Kind, Any, int | None, Any, int | None]:
    """Returns the one encoding with its name and kind, and the static arguments."""
    given = encodings
    if len(encodings) > 1:
        given = {name: value for name, value in encodings.items() if value is not None}
    if len(given) != 1:
        got = f"both {' and '.join(given)}" if given else "none"
        call.fail(f"got {got}; give exactly one of {', '.join(encodings)}.")
    ((name, value),) = given.items()
    if padding_id is not None:
        if name != "segment_ids":
            call.fail(
                f"padding_id is {padding_id!r}, but the segments are given by {name}; "
                "padding_id goes with segment_ids only: leave it out."
            )
        padding_id = call.integer("padding_id", padding_id)
    if call.axis_name is not None:
        _ = call.devices  # Raises for a bad axis_name.
    kind = lengths_kind if name == "lengths" else _KINDS[name]
    parse = call.booleans if kind in ("mask", "starts") else call.integers
    values = parse(name, value)
    axis = axis if axis is None else call.integer("axis", axis)
    if batch_axis is not None:
        axes = batch_axis if isinstance(batch_axis, (tuple, list)) else (batch_axis,)
        batch_axis = tuple(call.integer("batch_axis", a) for a in axes)
    return name, kind, values, axis, batch_axis, padding_id


def _segments(
    call: Call, x_shape: tuple[int, ...], name: str, values: Any, layout: Layout
) -> tuple[Any, Layout]:
    """Returns checked segments, whose last axis goes over steps or segments."""
    if call.axis_name is not None and not layout.per_step:
        names = {call.axis_name} if isinstance(call.axis_name, str) else call.axis_name
        if differ := _compat.varying(values) & set(names):
            call.fail(
                f"{name} varies over mesh axis {sorted(differ)}, but axis_name is "
                f"{call.axis_name!r}: every device needs the {name} of the whole rows; "
                "pass it into shard_map with in_specs that leave that axis out."
            )
    if name == "lengths" and isinstance(values, jax.Array):
        return values, layout
    if layout.per_step:  # They lie like x.
        at = sorted((*layout.batch_axes, layout.axis)).index(layout.axis)
        numpy: Any = jnp if isinstance(values, jax.Array) else np
        values = values if at == values.ndim - 1 else numpy.moveaxis(values, at, -1)
    if not isinstance(values, jax.Array):
        return HostValues(call, x_shape, name, values, layout).checked()
    if name == "cu_seqlens":
        return _differences(values), layout
    if layout.padding_id is not None:
        info = jnp.iinfo(values.dtype)
        if not info.min <= layout.padding_id <= info.max:
            call.fail(
                f"padding_id is {layout.padding_id}, but segment_ids has dtype "
                f"{values.dtype}, which holds {info.min} to {info.max}; use another "
                "padding_id or another dtype."
            )
    return values, layout


@lru_cache(maxsize=4096)  # Otherwise a fifth of the time of an eager call.
def _layout(
    call: Call,
    x_shape: tuple[int, ...],
    name: str,
    kind: Kind,
    shape: tuple[int, ...],
    axis: int | None,
    batch_axis: tuple[int, ...] | None,
    padding_id: int | None,
) -> Layout:
    layout = _Shapes(call, x_shape, name, kind, shape).layout(axis, batch_axis)
    return layout._replace(padding_id=padding_id)


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
        if self.name == "cu_seqlens" and self.shape[-1:] == (0,):
            self._disagree(
                "the last axis of cu_seqlens needs at least 1 entry, the leading 0; K "
                "segments take K + 1 offsets"
            )
        batch_rank = len(self.shape) - (self.kind != "padded")
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
            self._disagree(self._other_rank(batch_rank, axis, batch_axes))
        if len({*batch_axes, axis}) != batch_rank + 1:
            self.call.fail(
                f"batch_axis {batch_axis} and axis {axis} must name different axes of "
                f"{x_name} (shape {x_shape}); give axis and batch_axis explicitly."
            )
        layout = Layout(self.kind, axis, batch_axes, None, self.call.function)
        if layout.per_step:
            layout = layout._replace(batch_axes=tuple(sorted(batch_axes)))
            axes = tuple(sorted((*batch_axes, axis)))
            if self.shape != (sizes := tuple(x_shape[a] for a in axes)):
                self._disagree(self._other_steps(axes, sizes))
        elif self.shape[:batch_rank] != (
            sizes := tuple(x_shape[a] for a in batch_axes)
        ):
            self._disagree(self._other_sizes(sizes, axis, batch_axes))
        return layout

    def _refuse_a_batch(self, axis: int | None) -> None:
        """Raises where axis 0, the segment axis by default, looks like a batch axis."""
        if self.name == "lengths" and self.kind == "packed" and axis is None:
            count = self.shape[0]
            if len(self.shape) == 1 < min(count, len(self.x_shape)):
                if self.x_shape[0] == count:
                    self._disagree(
                        f"{count} segments along axis 0 of size {count}; use "
                        "reverse_sequence for one length a row, give batch axes to "
                        "lengths for several, or pass axis=0 if that is right"
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
        if self.call.x_name.endswith("[0]"):  # A list is a pytree.
            why += "; give a list of rows to pack_segments, as np.concatenate(rows)"
        self.call.fail(
            f"{self.name} has shape {self.shape} and {self.call.x_name} has shape "
            f"{self.x_shape}: {why}."
        )

    def _other_rank(self, batch_rank: int, axis: int, batch_axes: Any) -> str:
        remedy = "give one entry for each row, or name the axes with axis"
        remedy += " and batch_axis" * self.call.reverses
        if self.name == "lengths" and len(self.shape) > len(self.x_shape):
            remedy += f", or swap {self.call.x_name} and lengths"
        elif not self.call.reverses and len(self.shape) < 2 + (self.kind != "padded"):
            remedy = (
                f"give {self.call.x_name} the batch axes, with jax.numpy.broadcast_to "
                "if all rows are equal"
            )
        return (
            f"{self.name} has {batch_rank} batch axes, but {self.call.x_name} (rank "
            f"{len(self.x_shape)}) has batch axes {batch_axes} beside axis {axis}; "
            f"{remedy}{self._several()}"
        )

    def _other_sizes(self, sizes: Any, axis: int, batch_axes: Any) -> str:
        batch = self.shape[: len(sizes)]
        remedy = "give one entry for each row, or name the axes with axis"
        if axis == len(sizes) and self.x_shape[1 : axis + 1] == batch:
            remedy = f"if {self.call.x_name} is time-major, use axis=0"
        return (
            f"the batch axes {batch_axes} of {self.call.x_name} have sizes {sizes}, "
            f"but {self.name} has {batch}; {remedy}{self._several()}"
        )

    def _several(self) -> str:
        if self.kind != "padded" or len(self.shape) < 2:
            return ""
        use = "cu_seqlens= or segment_ids="
        use = "reverse_segments" if self.call.reverses else use
        return f"; for several segments a row use {use}"

    def _other_steps(self, axes: Any, sizes: Any) -> str:
        remedy = "correct it, or name the axes with axis"
        if self.shape == sizes[::-1]:
            remedy = f"transpose it, or use axis=0 if {self.call.x_name} is time-major"
        return (
            f"{self.name} has one entry for each position and lies like "
            f"{self.call.x_name}, whose axes {axes} have sizes {sizes}; {remedy}"
        )


@compiled
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

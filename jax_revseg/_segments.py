"""From the encoding of a call, such as `lengths`, to `(segments, Layout)`, checked.

Values on the host are checked against the segment axis. Values in JAX arrays are not
checked: that would block until the device has computed them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg._arguments import BatchAxis, Call
from jax_revseg._layout import Kind, Layout
from jax_revseg._linear import compiled
from jax_revseg._lowering import position_dtype

Segments = np.ndarray | jax.Array
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
) -> tuple[Segments, Layout]:
    """Returns the segments, from the one encoding that is given, and their layout."""
    given = [name for name in encodings if encodings[name] is not None]
    if len(given) != 1 < len(encodings):
        call.fail(
            f"got {' and '.join(given) or 'none'} of {', '.join(encodings)}; give "
            "exactly one of them."
        )
    (name,) = given or encodings
    if padding_id is not None and name != "segment_ids":
        call.fail(
            f"padding_id is {padding_id!r}, but the segments are given by {name}; "
            "padding_id goes with segment_ids only: leave it out."
        )
    kind = lengths_kind if name == "lengths" else _KINDS[name]
    encoding = _Encoding(call, x.shape, name, kind, call.devices)
    values = encoding.array(encodings[name])
    if axis is not None:
        axis = call.integer("axis", axis)
    if batch_axis is not None:
        axes = batch_axis if isinstance(batch_axis, (tuple, list)) else (batch_axis,)
        batch_axis = tuple(call.integer("batch_axis", a) for a in axes)
    layout = encoding.layout(values.shape, axis, batch_axis)
    if name == "segment_ids":
        return encoding.ids(values, layout, padding_id)
    if name == "mask":
        return values, layout
    if name == "cu_seqlens":
        return encoding.differences(values, layout), layout
    return encoding.lengths(values, layout), layout


def parse_arrays(
    call: Call,
    name: str,
    tree: Any,
    axis: int | None,
    batch_axis: BatchAxis = None,
    **encodings: Any,
) -> tuple[Any, Segments, Layout]:
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


class _Encoding(NamedTuple):
    """The argument of a call that says where the segments of `x` lie."""

    call: Call
    x_shape: tuple[int, ...]
    name: str
    kind: Kind
    devices: int

    def array(self, given: Any) -> Any:
        if self.kind == "mask":
            return self.call.booleans(self.name, given)
        values = self.call.integers(self.name, given)
        if self.name == "cu_seqlens" and values.shape[-1:] == (0,):
            self.call.fail(
                f"cu_seqlens has shape {values.shape}, but its last axis needs at "
                "least 1 entry, the leading 0; K segments take K + 1 offsets."
            )
        return values

    @lru_cache(maxsize=4096)  # noqa: B019  # Otherwise half the time of an eager call.
    def layout(
        self,
        shape: tuple[int, ...],
        axis: int | None,
        batch_axis: tuple[int, ...] | None,
    ) -> Layout:
        """Counts all axes from 0, and compares the shapes."""
        x_shape, x_name, ndim = self.x_shape, self.call.x_name, len(self.x_shape)
        batch_rank = len(shape) - (self.kind != "padded")
        if batch_rank < 0:
            self._disagree(
                shape,
                f"but {self.name} needs at least 1 axis, the one that runs over the "
                "segments; for one length a row use reverse_sequence",
            )
        axis = batch_rank if axis is None else self._canonical("axis", axis)
        if batch_axis is None:
            batch_axes = tuple(a for a in range(ndim) if a != axis)[:batch_rank]
        else:
            batch_axes = tuple(self._canonical("batch_axis", a) for a in batch_axis)
        if axis >= ndim or len(batch_axes) != batch_rank:
            self._disagree(
                shape,
                f"{self.name} has {batch_rank} batch axes, so {x_name} needs that many "
                f"beside axis {axis}, but has rank {ndim} and batch axes "
                f"{batch_axes}; give one entry for each row, or name the axes",
            )
        if len({*batch_axes, axis}) != batch_rank + 1:
            self.call.fail(
                f"batch_axis {batch_axis} and axis {axis} must name different axes of "
                f"{x_name} (shape {x_shape}); give axis and batch_axis explicitly."
            )
        sizes = tuple(x_shape[a] for a in batch_axes)
        if shape[:batch_rank] != sizes:
            self._disagree(shape, self._other_sizes(shape, sizes, axis, batch_axes))
        if self.kind in ("ids", "mask") and shape[-1] != x_shape[axis]:
            self._disagree(
                shape,
                f"axis {axis} of {x_name} has size {x_shape[axis]}, so {self.name} "
                f"needs that many entries a row, one for each position, but has "
                f"{shape[-1]}",
            )
        return Layout(self.kind, axis, batch_axes)

    def _canonical(self, argument: str, value: int) -> int:
        ndim = len(self.x_shape)
        if not -ndim <= value < ndim:
            self.call.fail(
                f"{argument} is {value}, but {self.call.x_name} has rank {ndim} (shape "
                f"{self.x_shape}); use a value from {-ndim} to {ndim - 1}."
            )
        return value % ndim

    def _disagree(self, shape: tuple[int, ...], why: str) -> NoReturn:
        self.call.fail(
            f"{self.name} has shape {shape} and {self.call.x_name} has shape "
            f"{self.x_shape}: {why}."
        )

    def _other_sizes(self, shape: Any, sizes: Any, axis: int, batch_axes: Any) -> str:
        batch = shape[: len(sizes)]
        remedy = "give one entry for each row, or name the axes with axis"
        if axis == len(sizes) and self.x_shape[1 : axis + 1] == batch:
            remedy = f"if {self.call.x_name} is time-major, use axis=0"
            if self.kind in ("ids", "mask"):
                remedy += f" ({self.name} stays batch-major)"
        return (
            f"the batch axes {batch_axes} of {self.call.x_name} have sizes {sizes}, "
            f"but {self.name} has {batch}; {remedy}"
        )

    def _raise_at(self, bad: np.ndarray, values: np.ndarray, rule: str) -> None:
        """Raises for the first value that breaks a rule."""
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            at = f"[{', '.join(map(str, index))}]" if index else ""
            self.call.fail(f"{self.name}{at} is {values[index]}, but {rule}.")

    def _axis_size(self, layout: Layout) -> tuple[Any, str]:
        """Returns the global size of the segment axis, and its name in messages."""
        size = self.x_shape[layout.axis] * self.devices
        over = f" over {self.devices} devices" if self.devices > 1 else ""
        return (
            size,
            f"{size}, the size of axis {layout.axis} of {self.call.x_name}{over}",
        )

    def lengths(self, values: Segments, layout: Layout) -> Segments:
        """One length for each row, or several that are laid end to end."""
        if isinstance(values, jax.Array):
            return values
        size, limit = self._axis_size(layout)
        rule = f"must lie between 0 and {limit}; clip or correct it"
        bad = values < 0
        if isinstance(size, int):  # A symbolic size is known only in the program.
            bad |= values > size
        self._raise_at(bad, values, rule)
        if self.kind == "packed" and isinstance(size, int):
            sums = np.asarray(values.astype(np.int64).sum(-1))
            rule = f"must not pass {limit}; correct them (for one length a row use "
            self._replace(name="lengths.sum(-1)")._raise_at(
                sums > size, sums, rule + "reverse_sequence)"
            )
        return _as_positions(values, size)

    def differences(self, values: Segments, layout: Layout) -> Segments:
        """The lengths between cumulative offsets."""
        if isinstance(values, jax.Array):
            return compiled(_differences)(values)
        size, limit = self._axis_size(layout)
        first = np.zeros(values.shape, bool)
        first[..., 0] = values[..., 0] != 0
        self._raise_at(first, values, "the first offset must be 0")
        falls = np.zeros(values.shape, bool)
        falls[..., 1:] = values[..., 1:] < values[..., :-1]
        self._raise_at(
            falls, values, "must not be less than the offset before it; correct it"
        )
        if isinstance(size, int):
            rule = f"must not pass {limit}; correct it, or name the axis with axis"
            self._raise_at(values > size, values, rule)
        return _as_positions(np.diff(values), size)

    def ids(
        self, values: Segments, layout: Layout, padding_id: Any
    ) -> tuple[Segments, Layout]:
        """One id for each position."""
        if padding_id is not None:
            padding_id = self.call.integer("padding_id", padding_id)
        if isinstance(values, jax.Array):
            if padding_id is not None:
                info = jnp.iinfo(values.dtype)
                if not info.min <= padding_id <= info.max:
                    self.call.fail(
                        f"padding_id is {padding_id}, but segment_ids has dtype "
                        f"{values.dtype}, which holds {info.min} to {info.max}; use "
                        "another padding_id or another dtype."
                    )
            return values, layout._replace(padding_id=padding_id)
        if self.devices > 1:
            self.call.fail(
                f"segment_ids is on the host, the same on all {self.devices} "
                "devices of axis_name, which hold different blocks of the ids; pass it "
                "into shard_map with in_specs like those of x."
            )
        # Ids that differ only past 32 bits would become equal on a device: number the
        # runs instead.
        starts = np.ones(values.shape, bool)
        starts[..., 1:] = values[..., 1:] != values[..., :-1]
        runs = np.cumsum(starts, -1)
        if padding_id is not None:
            runs = np.where(values == padding_id, 0, runs)
            padding_id = 0
        size = self.x_shape[layout.axis]
        return _as_positions(runs, size), layout._replace(padding_id=padding_id)


def _as_positions(values: np.ndarray, size: Any) -> np.ndarray:
    """Casts checked host values to the dtype of positions, saturating."""
    dtype = position_dtype(size)
    if values.dtype.itemsize == 8:  # Objects, too.
        values = np.asarray(np.minimum(values, np.iinfo(dtype).max))  # May be an int.
    return values.astype(dtype, copy=False)


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

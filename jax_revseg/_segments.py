"""From the encoding of a call, such as `lengths`, to `(segments, Layout)`, checked.

Values in JAX arrays are not checked: that would block until the device has computed
them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from jax_revseg import _compat
from jax_revseg._arguments import Call
from jax_revseg._host_values import HostValues
from jax_revseg._layout import Kind, Layout
from jax_revseg._linear import compiled
from jax_revseg._primitive import merged_spec

_KINDS: dict[str, Any] = {"segment_ids": "ids", "cu_seqlens": "packed"}


def parse_segments(
    call: Call, x: jax.Array, axis: Any, batch_axis: Any = None, **encodings: Any
) -> tuple[Any, Layout]:
    """Returns the segments, from the one encoding that is given, and their layout."""
    values, static = _parse(call, axis, batch_axis, **encodings)
    layout = _layout(call, x.shape, values.shape, static)
    return _segments(call, x.shape, static[0], values, layout)


def parse_arrays(
    call: Call, name: str, tree: Any, axis: Any, batch_axis: Any = None, **more: Any
) -> tuple[Any, Any, Layout]:
    """Returns the arrays of a pytree, which share their segments and their axes."""
    call = call._replace(x_name=name)
    leaves, treedef = tree_flatten_with_path(tree)
    if not leaves:
        call.fail(f"{name} is {tree!r}, a pytree without an array; give at least 1.")
    if type(tree).__name__ == "PackedSequence":  # PyTorch's, a named tuple.
        call.array(tree)
    values, static = _parse(call, axis, batch_axis, **more)
    arrays, found = [], {}
    for path, leaf in leaves:
        of_leaf = call._replace(x_name=f"{name}{keystr(path)}")
        arrays.append(x := of_leaf.array(leaf))
        layout = _layout(of_leaf, x.shape, values.shape, static)
        found[layout, x.shape[layout.axis]] = of_leaf, x.shape
    if len(found) > 1:
        shapes = [f"{c.x_name} has shape {shape}" for c, shape in found.values()]
        what = f"the arrays disagree about the segment axis: {' and '.join(shapes)}"
        call.fail(f"{what}; give them the same axes, and count axis from the start.")
    [((layout, _), (call, shape))] = found.items()
    segments, layout = _segments(call, shape, static[0], values, layout)
    for x in arrays:  # The primitive, too, asks for it; but a scan may not bind it.
        merged_spec(jax.typeof(x), jax.typeof(segments), layout)
    return treedef.unflatten(arrays), segments, layout


def _parse(
    call: Call,
    axis: Any,
    batch_axis: Any,
    padding_id: Any = None,
    lengths_kind: Kind = "padded",
    **encodings: Any,
) -> tuple[Any, tuple[Any, ...]]:
    """Returns the one encoding, and its name and kind with the static arguments."""
    given = encodings
    if len(encodings) > 1:
        given = {name: value for name, value in encodings.items() if value is not None}
    if len(given) != 1:
        got = f"both {' and '.join(given)}" if given else "none"
        call.fail(f"got {got}; give exactly one of {', '.join(encodings)}.")
    ((name, value),) = given.items()
    if padding_id is not None:
        if name != "segment_ids":
            what = f"padding_id is {padding_id!r}, but the segments are given by {name}"
            call.fail(f"{what}; leave it out, it goes with segment_ids only.")
        padding_id = call.integer("padding_id", padding_id)
    if call.axis_name is not None:
        _ = call.devices  # Raises for a bad axis_name.
    kind = lengths_kind if name == "lengths" else _KINDS.get(name, name)
    values = call.values(name, value, boolean=kind in ("mask", "starts"))
    axis = axis if axis is None else call.integer("axis", axis)
    if batch_axis is not None:
        axes = batch_axis if isinstance(batch_axis, (tuple, list)) else (batch_axis,)
        batch_axis = tuple(call.integer("batch_axis", a) for a in axes)
    return values, (name, kind, axis, batch_axis, padding_id)


def _segments(
    call: Call, x_shape: Any, name: str, values: Any, layout: Layout
) -> tuple[Any, Layout]:
    """Returns checked segments, whose last axis goes over steps or segments."""
    on_device = not isinstance(values, np.ndarray)
    if on_device and name == "lengths" and call.axis_name is None:  # The usual call.
        return values, layout
    if layout.per_step:  # They lie like x.
        at = layout.time_axis
        numpy: Any = jnp if on_device else np
        values = values if at == values.ndim - 1 else numpy.moveaxis(values, at, -1)
    elif call.axis_name is not None:
        if differ := _compat.varying(values) & {*jax.tree.leaves(call.axis_name)}:
            what = f"{name} varies over mesh axis {sorted(differ)}, but must be global"
            call.fail(f"{what}; use in_specs that leave that axis out.")
    if not on_device:
        return HostValues(call, x_shape, name, values, layout).checked()
    if name == "cu_seqlens":
        return _differences(values), layout
    if layout.padding_id is not None:
        info = jnp.iinfo(values.dtype)
        if not info.min <= layout.padding_id <= info.max:
            what = (
                f"padding_id is {layout.padding_id}, but segment_ids are {values.dtype}"
            )
            call.fail(f"{what}, which holds {info.min} to {info.max}; use another.")
    return values, layout


@lru_cache(maxsize=4096)  # Otherwise a fifth of the time of an eager call.
def _layout(call: Call, x_shape: Any, shape: Any, static: tuple[Any, ...]) -> Layout:
    """Counts all axes from 0, and compares the shapes."""
    name, kind, axis, batch_axis, padding_id = static
    x, ndim, rank = call.x_name, len(x_shape), len(shape)
    batch = shape if kind == "padded" else shape[:-1]
    # One length for each row, where several are expected.
    wrong = name == "lengths" and kind == "packed" and axis is None
    wrong = wrong and 1 == rank < ndim and 1 < shape[0] == x_shape[0]
    wrong |= kind != "padded" and rank == 0
    wrong |= name == "cu_seqlens" and shape[-1:] == (0,)
    try:
        axis = len(batch) if axis is None else range(ndim)[axis]
        axes = tuple(a for a in range(ndim) if a != axis)[: len(batch)]
        axes = axes if batch_axis is None else tuple(range(ndim)[a] for a in batch_axis)
    except IndexError:
        call.fail(
            f"axis is {axis} and batch_axis is {batch_axis}, but {x} has rank {ndim} "
            f"(shape {x_shape}); use values from {-ndim} to {ndim - 1}."
        )
    twice = len({*axes, axis}) != len(axes) + 1
    layout, expected = Layout(kind, axis, axes, padding_id, call.function), batch
    if layout.per_step:  # They lie like x.
        layout = layout._replace(batch_axes=tuple(sorted(axes)))
        axes, expected = tuple(sorted((*axes, axis))), shape
    sizes = tuple(x_shape[a] for a in axes if a < ndim)
    if not (wrong or twice) and axis < ndim and expected == sizes:
        return layout
    call.fail(
        f"{name} has shape {shape} and {x} has shape {x_shape}: {name} goes with axes "
        f"{axes}, of sizes {sizes}, and axis {axis} is the segment axis; "
        f"{_remedy(call, name, shape, x_shape, layout, sizes, twice)}."
    )


def _remedy(call, name, shape, x_shape, layout, sizes, twice) -> str:
    x, ndim, rank, per_step = call.x_name, len(x_shape), len(shape), layout.per_step
    padded = layout.kind == "padded"
    batch = shape if padded else shape[:-1]
    single = name == "lengths" and layout.kind == "packed" and rank < 2
    several = "cu_seqlens= or segment_ids=, for a mask mask= (boolean)"
    several = "reverse_segments" if call.reverses else several
    local = per_step and call.axis_name is not None
    hints = {
        "give different axes in axis and batch_axis": twice,
        "use reverse_sequence for one length a row or axis=0": single and call.reverses,
        "use jax.vmap over batches": call.function == "pack_segments",
        "K segments take K + 1 offsets": name == "cu_seqlens",
        f"for several segments a row use {several}": padded and rank > 1,
        f"swap {x} and lengths": name == "lengths" and rank > ndim,
        f"give {x} batch axes, with jax.numpy.broadcast_to if all rows are equal"
        f"{', or swap init and xs' * x.startswith('xs')}": layout.axis == ndim == 1,
        f"transpose {name}": per_step and shape == sizes[::-1],
        f"if {x} is time-major, use axis=0": batch == x_shape[1 : len(batch) + 1] != (),
        f"give this device's block of {name}, by in_specs like those of {x}": local,
        "give np.concatenate(rows) to pack_segments": "[0]" in x and not local,
    }
    default = f"give one entry for each {'step' if per_step else 'row'}, or name the "
    default += f"axes with axis{' and batch_axis' * call.reverses}"
    return "; ".join(hint for hint in hints if hints[hint]) or default


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

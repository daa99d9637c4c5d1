"""Axes, lengths, ids and offsets: from what the user wrote to one checked form.

Every error message for bad input is made here (but for sharding, which only the
primitive sees). Values that lie on the host are checked against the axis; values on a
device, and traced ones, are never waited for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_revseg._lowering import position_dtype

BatchAxis = int | Sequence[int] | None
Integers = ArrayLike | Sequence[Any]  # ArrayLike leaves lists out.


class Segments(NamedTuple):
    """The operands and parameters of one bind, but for `x`."""

    values: Any  # A JAX array, or a NumPy array that was checked.
    axis: int
    batch_axes: tuple[int, ...]
    layout: str
    padding_id: int | None = None


def as_array(name: str, x: Any) -> jax.Array:
    """An array of at least one axis, or an error that says what came instead."""
    if not isinstance(x, jax.Array):
        if not (isinstance(x, (np.ndarray, np.generic)) or hasattr(x, "__jax_array__")):
            raise TypeError(
                f"{name}: x must be an array, but has type {type(x).__name__}; convert "
                "it with jax.numpy.asarray (or use jax.tree.map for a pytree)."
            )
        try:
            x = jnp.asarray(x)
        except TypeError as error:
            raise TypeError(
                f"{name}: x has dtype {getattr(x, 'dtype', None)}, which is none of "
                "JAX's; convert it to numbers first."
            ) from error
    if x.ndim == 0:
        raise ValueError(
            f"{name}: x has rank 0 (shape ()), but needs at least 1 axis to reverse; "
            "give it one with x[None]."
        )
    return x


def _as_array_of_any(name: str, argument: str, given: Any) -> np.ndarray | jax.Array:
    """What is no JAX array yet: on a device if a part of it is, else on the host."""
    on_device = hasattr(given, "__jax_array__") or any(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)
    )
    try:
        values: Any = (jnp if on_device else np).asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {argument} is not an array: {error}") from error
    if on_device:
        return values
    if values.dtype == np.float64:
        # So is an empty list, and one of 1 and 2**63: let the elements decide.
        elements = np.asarray(given, object)
        if all(isinstance(element, int) for element in elements.flat):
            values = elements
    kind = values.dtype.kind
    # Python integers past 64 bits are objects; they are out of range, said later. Kind
    # V holds int4 and its like.
    if kind not in "biufcV" and not all(isinstance(v, int) for v in values.flat):
        raise TypeError(
            f"{name}: {argument} is {given!r} of type {type(given).__name__}; give an "
            "array of integers."
        )
    return values


def as_integers(name: str, argument: str, values: Any) -> np.ndarray | jax.Array:
    """Integers where they are: a NumPy array from the host, or a JAX array."""
    if not isinstance(values, jax.Array):
        values = _as_array_of_any(name, argument, values)
    dtype = values.dtype
    if not (dtype == "O" or jnp.issubdtype(dtype, jnp.integer)):
        remedy = "convert them with .astype(int)"
        if jnp.issubdtype(dtype, jnp.bool_):
            remedy = "a mask is segment_ids=mask.astype(int), padding_id=0"
        raise TypeError(
            f"{name}: {argument} has dtype {dtype}, but must be integers; {remedy}."
        )
    return values


def as_padding_value(name: str, dtype: DTypeLike, value: Any) -> jax.Array:
    """The value in the dtype of x, if that can hold it."""
    scalar = isinstance(value, (bool, int, float, complex, np.generic))
    if not scalar and (shape := getattr(value, "shape", None)) != ():
        got = f"has shape {shape}" if shape else f"is {value!r}"
        raise (ValueError if shape else TypeError)(
            f"{name}: padding_value {got}, but must be a scalar (shape ()); use "
            "jax.numpy.where for anything else."
        )
    if isinstance(value, np.generic):
        value = value.item()  # Only the value counts, as it does for a Python scalar.
    if jnp.issubdtype(dtype, jnp.bool_) and isinstance(value, int) and value in (0, 1):
        value = bool(value)  # The default value of packing is 0.
    given = getattr(value, "dtype", None)
    try:
        # Extended dtypes, those of keys, take part in no promotion.
        fits = given == dtype or jnp.result_type(dtype, value) == dtype
        if fits and isinstance(value, int | float):
            if jnp.issubdtype(dtype, jnp.integer):
                fits = jnp.iinfo(dtype).min <= value <= jnp.iinfo(dtype).max
            elif jnp.issubdtype(dtype, jnp.floating) and math.isfinite(value):
                fits = abs(value) <= float(jnp.finfo(dtype).max)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise TypeError(
            f"{name}: padding_value is {value!r}, which x with dtype {dtype} cannot "
            f"hold; use a scalar of dtype {dtype}, or convert x first."
        )
    return jnp.asarray(value, dtype)


def _integer(name: str, argument: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}: {argument} is {value!r} of type {type(value).__name__}; use "
            "an int."
        ) from None


def as_size(name: str, argument: str, value: Any) -> int:
    """A size that is known when the program is traced."""
    size = _integer(name, argument, value)
    if size < 0:
        raise ValueError(f"{name}: {argument} is {size}; it must be 0 or more.")
    return size


def check_rank_one(name: str, lengths: np.ndarray | jax.Array) -> None:
    """Packing has one batch axis, the one that it makes."""
    if lengths.ndim != 1:
        raise ValueError(
            f"{name}: lengths has rank {lengths.ndim} (shape {lengths.shape}), but "
            "must have rank 1, one length for each segment; use jax.vmap over batches."
        )


@lru_cache(maxsize=4096)
def resolve_axes(
    name: str,
    argument: str,
    x_shape: tuple[int, ...],
    shape: tuple[int, ...],
    trailing: int,
    axis: int | None,
    batch_axis: int | tuple[int, ...] | None,
) -> tuple[int, tuple[int, ...]]:
    """The segment axis and the batch axes of x, all counted from 0."""
    ndim, batch_rank = len(x_shape), len(shape) - trailing
    has = f"{name}: {argument} has shape {shape} and x has shape {x_shape}"
    if batch_rank < 0:
        raise ValueError(
            f"{has}, but {argument} needs at least 1 axis: the one that runs over the "
            "segments. For a single length per row use reverse_sequence."
        )

    def canonical(which: str, value: int) -> int:
        if not -ndim <= value < ndim:
            raise ValueError(
                f"{name}: {which} is {value}, but x has rank {ndim} (shape {x_shape}); "
                f"use a value from {-ndim} to {ndim - 1}."
            )
        return value % ndim

    if axis is None:
        if batch_rank >= ndim:
            raise ValueError(
                f"{has}: with {batch_rank} batch axes, x needs rank {batch_rank + 1} "
                f"or more, but has {ndim}; {argument} must have one entry for each row."
            )
        axis = batch_rank
    axis = canonical("axis", axis)
    if batch_axis is None:
        others = [a for a in range(ndim) if a != axis]
        if batch_rank > len(others):
            raise ValueError(
                f"{has}: beside axis {axis}, x has {len(others)} axes for the "
                f"{batch_rank} batch axes of {argument}; give one entry for each row."
            )
        batch_axes = tuple(others[:batch_rank])
    else:
        given = (batch_axis,) if isinstance(batch_axis, int) else batch_axis
        batch_axes = tuple(canonical("batch_axis", a) for a in given)
        if len(batch_axes) != batch_rank:
            raise ValueError(
                f"{name}: batch_axis {batch_axis} names {len(batch_axes)} axes, but "
                f"{argument} (shape {shape}) has {batch_rank} batch axes; name as many."
            )
        if len({*batch_axes, axis}) != batch_rank + 1:
            raise ValueError(
                f"{name}: batch_axis {batch_axis} and axis {axis} must name different "
                f"axes of x (shape {x_shape}); give axis and batch_axis explicitly."
            )
    sizes = tuple(x_shape[a] for a in batch_axes)
    if shape[:batch_rank] != sizes:
        raise ValueError(
            f"{has}: axes {batch_axes} of x, the batch axes, have sizes {sizes}, but "
            f"{argument} has {shape[:batch_rank]}; give one entry for each row, or "
            "name the axes with axis and batch_axis."
        )
    return axis, batch_axes


def _axes(
    name: str,
    argument: str,
    x: jax.Array,
    values: Any,
    trailing: int,
    axis: int | None,
    batch_axis: BatchAxis,
) -> tuple[int, tuple[int, ...]]:
    if axis is not None:
        axis = _integer(name, "axis", axis)
    if isinstance(batch_axis, (tuple, list)):
        batch_axis = tuple(_integer(name, "batch_axis", a) for a in batch_axis)
    elif batch_axis is not None:
        batch_axis = _integer(name, "batch_axis", batch_axis)
    return resolve_axes(
        name, argument, x.shape, values.shape, trailing, axis, batch_axis
    )


def _raise_at(
    name: str, argument: str, bad: np.ndarray, values: np.ndarray, rule: str
) -> None:
    """Names the first value on the host that breaks a rule."""
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        where = f"{argument}[{', '.join(map(str, index))}]" if index else argument
        raise ValueError(f"{name}: {where} is {values[index]}, but {rule}.")


def _as_positions(lengths: np.ndarray, size: int) -> np.ndarray:
    """Checked host lengths, none above `size`, in the dtype of positions."""
    return lengths.astype(position_dtype(size), copy=False)  # A jitted call takes them.


def _whole(x: jax.Array, axis: int, blocks: int) -> tuple[int, str]:
    """The size of the segment axis with all its blocks, and how errors call it."""
    size = x.shape[axis] * blocks
    over = f" over {blocks} devices" if blocks > 1 else ""
    return size, f"{size}, the size of axis {axis} of x{over}"


def padded(
    name: str,
    x: jax.Array,
    lengths: Any,
    axis: int | None,
    batch_axis: BatchAxis,
    blocks: int,
) -> Segments:
    """One length for each row; x may be one of several blocks of the segment axis."""
    values = as_integers(name, "lengths", lengths)
    axis, batch_axes = _axes(name, "lengths", x, values, 0, axis, batch_axis)
    if isinstance(values, np.ndarray):
        size, which = _whole(x, axis, blocks)
        limit = f"must lie between 0 and {which}"
        bad = values < 0
        if isinstance(size, int):  # A symbolic size is known only when it runs.
            bad = bad | (values > size)
        _raise_at(name, "lengths", bad, values, f"{limit}; clip or correct it")
        values = _as_positions(values, size)
    return Segments(values, axis, batch_axes, "padded")


def packed(
    name: str,
    x: jax.Array,
    lengths: Any,
    axis: int | None,
    batch_axis: BatchAxis,
    blocks: int,
) -> Segments:
    """Several lengths for each row, laid end to end."""
    values = as_integers(name, "lengths", lengths)
    axis, batch_axes = _axes(name, "lengths", x, values, 1, axis, batch_axis)
    if isinstance(values, np.ndarray):
        size, which = _whole(x, axis, blocks)
        bad = values < 0
        _raise_at(name, "lengths", bad, values, "must not be negative; correct it")
        if isinstance(size, int):
            # Python integers, since 64 bits can overflow too.
            sums = np.asarray(values.astype(object).sum(-1), object)
            limit = f"must not pass {which}; correct them"
            _raise_at(name, "lengths.sum(-1)", sums > size, sums, limit)
        values = _as_positions(values, size)
    return Segments(values, axis, batch_axes, "packed")


@jax.jit
def _differences(offsets: jax.Array) -> jax.Array:
    """What lies between offsets on a device, where they may be anything."""
    bits = jnp.iinfo(offsets.dtype).bits
    if bits < 32:
        offsets, bits = offsets.astype(jnp.int32), 32
    start, end = offsets[..., :-1], offsets[..., 1:]
    # Exact without a sign, also where a signed difference would wrap.
    low, high = jnp.minimum(start, end), jnp.maximum(start, end)
    lengths = high.astype(f"uint{bits}") - low.astype(f"uint{bits}")
    lengths = jnp.minimum(lengths, jnp.iinfo(f"int{bits}").max).astype(f"int{bits}")
    return jnp.where(end < start, -lengths, lengths)


def offsets(
    name: str,
    x: jax.Array,
    cu_seqlens: Any,
    axis: int | None,
    batch_axis: BatchAxis,
    blocks: int,
) -> Segments:
    """Cumulative offsets: what lies between two of them is a segment."""
    values = as_integers(name, "cu_seqlens", cu_seqlens)
    axis, batch_axes = _axes(name, "cu_seqlens", x, values, 1, axis, batch_axis)
    if values.shape[-1] == 0:
        raise ValueError(
            f"{name}: cu_seqlens has shape {values.shape}, but its last axis needs at "
            "least 1 entry, the leading 0; K segments take K + 1 offsets."
        )
    size, which = _whole(x, axis, blocks)
    if isinstance(values, np.ndarray):
        bad = np.zeros(values.shape, bool)
        bad[..., 0] = values[..., 0] != 0
        _raise_at(name, "cu_seqlens", bad, values, "the first offset must be 0")
        bad[..., 1:] = values[..., 1:] < values[..., :-1]
        bad[..., 0] = False
        rule = "must not be less than the offset before it; sort or correct them"
        _raise_at(name, "cu_seqlens", bad, values, rule)
        if isinstance(size, int):
            limit = f"must not pass {which}; correct it"
            _raise_at(name, "cu_seqlens", values > size, values, limit)
        values = np.diff(_as_positions(values, size))
    else:
        values = _differences(values)
    return Segments(values, axis, batch_axes, "packed")


def ids(
    name: str,
    x: jax.Array,
    segment_ids: Any,
    padding_id: int | None,
    axis: int | None,
    batch_axis: BatchAxis,
    blocks: int,
) -> Segments:
    """One id for each position; a run of equal ids is a segment."""
    values = as_integers(name, "segment_ids", segment_ids)
    axis, batch_axes = _axes(name, "segment_ids", x, values, 1, axis, batch_axis)
    if values.shape[-1] != x.shape[axis]:
        raise ValueError(
            f"{name}: segment_ids has shape {values.shape}, but axis {axis} of x "
            f"(shape {x.shape}) has size {x.shape[axis]}; the last axis of "
            "segment_ids needs one id for each position."
        )
    if padding_id is not None:
        padding_id = _integer(name, "padding_id", padding_id)
    if isinstance(values, np.ndarray):
        if blocks > 1:
            raise ValueError(
                f"{name}: segment_ids is a {type(segment_ids).__name__} from the host, "
                f"the same on all {blocks} devices of axis_name, which hold different "
                "blocks of the ids; pass it into shard_map with in_specs like those of "
                "x."
            )
        # Ids that differ only past 32 bits would become equal on a device: keep the
        # number of the run instead.
        starts = np.ones(values.shape, bool)
        starts[..., 1:] = values[..., 1:] != values[..., :-1]
        runs = np.cumsum(starts, -1)
        if padding_id is not None:
            runs = np.where(values == padding_id, 0, runs)
            padding_id = 0
        values = _as_positions(runs, x.shape[axis])
    elif padding_id is not None:
        info = jnp.iinfo(values.dtype)
        if not info.min <= padding_id <= info.max:
            raise ValueError(
                f"{name}: padding_id is {padding_id}, but segment_ids has dtype "
                f"{values.dtype}, which holds {info.min} to {info.max}; no id can be "
                "equal to it: use another dtype or another padding_id."
            )
    return Segments(values, axis, batch_axes, "ids", padding_id)


def unpacked(
    name: str, x: jax.Array, lengths: np.ndarray | jax.Array, total_length: int
) -> Any:
    """The lengths of rows that will be laid end to end."""
    if x.ndim < 2 or lengths.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: lengths has shape {lengths.shape} and x has shape {x.shape}; x "
            "needs axes for rows and steps, and lengths one entry for each row."
        )
    if isinstance(lengths, np.ndarray):
        bad = lengths < 0
        _raise_at(name, "lengths", bad, lengths, "must not be negative; correct it")
        cut = np.minimum(lengths.astype(object), x.shape[1])
        if (total := sum(cut)) > total_length:
            raise ValueError(
                f"{name}: the valid steps number {total}, but total_length is "
                f"{total_length}; make it {total} or more."
            )
        lengths = _as_positions(cut, x.shape[1])
    return lengths

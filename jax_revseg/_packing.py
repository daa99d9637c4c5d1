"""From segments laid end to end to one row a segment, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike

from jax_revseg._arguments import Call, Integers
from jax_revseg._layout import Layout
from jax_revseg._linear import compiled
from jax_revseg._lowering import fill, packed_ends, saturate, starts_of
from jax_revseg._pack_primitive import bind
from jax_revseg._segments import parse_segments

_ROWS = Layout("padded", axis=1, batch_axes=(0,))  # One segment a row.


def pack_segments(
    x: ArrayLike,
    lengths: Integers,
    *,
    max_length: int | None = None,
    padding_value: ArrayLike = 0,
) -> jax.Array:
    """Gives each segment of a concatenated array a row of its own.

    A segment longer than `max_length` keeps its first `max_length` steps. Steps after
    the last segment are dropped. In JAX arrays a negative length counts as 0, and
    segments end at the end of `x`; under `jax.experimental.checkify` both raise. The
    gradient is `unpack_segments` of the gradient, without a scatter.

    Args:
        x: Array of shape `(S, ...)` and any dtype: the segments, end to end.
        lengths: Integers of shape `(N,)`, in steps; `sum(lengths) <= S`.
        max_length: Size of the segment axis of the result, an int. The default is the
            largest length, for lengths on the host.
        padding_value: Scalar that fills the padding.

    Returns:
        Array of shape `(N, max_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or `x` cannot hold `padding_value`.
        ValueError: `lengths` does not have rank 1, host lengths are negative or sum to
            more than `S`, or `max_length` is negative or missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import pack_segments
        >>> pack_segments(jnp.array([1, 2, 3, 4, 5]), [2, 3], max_length=4)
        Array([[1, 2, 0, 0],
               [3, 4, 5, 0]], dtype=int32)

    Source: Caffe2's `PackSegments`.
    """
    call = Call("pack_segments")
    x = call.array(x)
    values, _ = parse_segments(call, x, 0, (), lengths_kind="packed", lengths=lengths)
    max_length = _size_or(call, "max_length", max_length, values, np.max)
    value = call.scalar(padding_value, x)
    rows = bind(x, values, size=max_length, unpack=False)
    if isinstance(value, np.ndarray) and not any(value.tobytes()):
        return rows  # The padding is zero already.
    return fill(rows, _row_lengths(x, values), value, _ROWS)


def unpack_segments(
    x: ArrayLike, lengths: Integers, *, total_length: int | None = None
) -> jax.Array:
    """Concatenates the valid steps of each row: the inverse of `pack_segments`.

    Row `n` gives its first `lengths[n]` steps, or as many as it has. Positions that
    remain at the end are zero; steps past the end are dropped. In JAX arrays a negative
    length counts as 0; under `jax.experimental.checkify` negative lengths, and valid
    steps past the end, raise. The gradient is `pack_segments` of the gradient, without
    a scatter.

    Args:
        x: Array of shape `(N, L, ...)` and any numeric dtype, one segment a row.
        lengths: Integers of shape `(N,)`, in steps.
        total_length: Size of the first axis of the result, an int. The default is the
            number of valid steps, for lengths on the host.

    Returns:
        Array of shape `(total_length, ...)` and the dtype of `x`.

    Raises:
        TypeError: `lengths` are not integers, or the dtype of `x` has no zero.
        ValueError: `x` has no axis for the steps, `lengths` does not have shape `(N,)`,
            host lengths are negative or need more than `total_length` steps, or
            `total_length` is negative or missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import unpack_segments
        >>> unpack_segments(jnp.array([[1, 2, 0], [3, 4, 5]]), [2, 3], total_length=6)
        Array([1, 2, 3, 4, 5, 0], dtype=int32)

    Source: Caffe2's `UnpackSegments`.
    """
    call = Call("unpack_segments")
    x = call.array(x)
    values = call.values("lengths", lengths)
    if x.ndim < 2 or values.shape != x.shape[:1]:
        what = f"lengths has shape {values.shape} and x has shape {x.shape}; x needs"
        call.fail(f"{what} axes for rows and steps, lengths one entry for each row.")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended) or x.dtype == "float8_e8m0fnu":
        what = f"x has dtype {x.dtype}, which has no zero for the tail"
        remedy = "unpack jax.random.key_data(x) or x.view('uint8')"
        call.fail(f"{what}; {remedy}.", TypeError)
    if on_host := isinstance(values, np.ndarray):
        for n in np.flatnonzero(values < 0):
            call.fail(f"lengths[{n}] is {values[n]}, which is negative; correct it.")
        steps = x.shape[1] if isinstance(x.shape[1], int) else 2**31 - 1
        values = np.minimum(values, np.int64(steps)).astype(np.int32)
    total_length = _size_or(call, "total_length", total_length, values, np.sum)
    static = isinstance(x.shape[1], int) and isinstance(total_length, int)
    if on_host and static and (total := values.sum()) > total_length:
        what = f"the valid steps number {total}, but total_length is {total_length}"
        call.fail(f"{what}; make it {total} or more.")
    # A row gives as many steps as it has; negative lengths remain, for checkify.
    return bind(x, _saturate(x, values), size=total_length, unpack=True)


def _size_or(call: Call, argument: str, given: Any, lengths: Any, default: Any) -> Any:
    if given is not None:  # Symbolic under `jax.export`.
        return given if is_symbolic_dim(given) else call.integer(argument, given, 0)
    if isinstance(lengths, jax.Array):
        why = f"{argument} is left out, but the lengths are in a JAX array"
        call.fail(f"{why}, so their values are not known; give {argument}, an int.")
    return int(default(lengths.astype(np.int64), initial=0))


@compiled
def _row_lengths(x, lengths):
    ends = packed_ends(lengths, x.shape[0])
    return ends - starts_of(ends)


@compiled
def _saturate(x, lengths):
    return saturate(lengths, x.shape[1])

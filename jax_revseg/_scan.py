"""Scans along the segment axis of ragged rows, which restart at every segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax_revseg import _carry
from jax_revseg._arguments import AxisName, Call, Integers
from jax_revseg._associative import combine_rows
from jax_revseg._programs import run
from jax_revseg._recurrence import scan_both_ways, scan_rows
from jax_revseg._segments import parse_arrays


def scan_segments(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    starts: Any = None,
    mask: Any = None,
    padding_id: int | None = None,
    carry_in: Any = None,
    reverse: bool = False,
    axis: int | None = None,
    unroll: int | bool = 1,
    chunk: int | None = None,
) -> tuple[Any, Any]:
    """Scans ragged rows: `jax.lax.scan` that skips padding and restarts at segments.

    All rows advance together, one step of the segment axis at a time. The carry starts
    from `init` at every segment. Padding, even NaN, never affects outputs or gradients:
    at padding, `f` gets the first valid step of the row and the carry that enters it,
    and its result is discarded. A row without a valid step borrows both from another
    row. One row alone, as under `jax.vmap`, has no other: `f` then gets steps of 0.5
    (or 1) and must be differentiable there.

    Python and NumPy encodings are checked at the call. In JAX arrays lengths are
    clipped, as in `reverse_sequence`; under `jax.experimental.checkify` they raise.
    Repeated eager calls with the same `f` and the same shapes compile once.

    Args:
        f: `f(carry, x) -> (carry, y)`: one step of all rows. `carry`, `x` and `y` are
            pytrees of arrays whose first axes are the batch axes. The results of a row
            must depend on that row alone.
        init: The carry at the start of each segment: a pytree of arrays of any dtype
            whose first axes are the batch axes.
        xs: Array or pytree of arrays of any dtype, `(*batch, T, ...)` by default.
        lengths: Integers of shape `batch`: one segment a row, from position 0. Exactly
            one of `lengths`, `segment_ids`, `cu_seqlens`, `starts` and `mask` is given.
        segment_ids: Integers, one for each position: every maximal run of equal ids is
            a segment. They lie like `xs`: `(*batch, T)` by default, `(T, *batch)` with
            `axis=0`.
        cu_seqlens: Integers of shape `(*batch, K + 1)`: cumulative offsets from 0.
        starts: Booleans that lie like `segment_ids`, true at the first step of each
            segment. The first step of a row is a start, marked or not.
        mask: Booleans that lie like `segment_ids`: one segment a row, which may have
            holes. A masked step holds the carry and gives a zero `y`, as in Keras with
            `zero_output_for_mask=True`.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
        carry_in: The carry that enters each row, like `init` in structure, shapes and
            dtypes. The row's first segment, in the direction of the scan, goes on from
            it; later segments start from `init`. The default is `init`.
        reverse: Scans each segment from its last step to its first. No data is
            reversed: `ys` stays in the order of `xs`.
        axis: The segment axis of each array in `xs`. The default is the axis right
            after the batch axes; 0 is time-major. The batch axes are the first others.
        unroll: Steps in one iteration of the loop, as for `jax.lax.scan`.
        chunk: Steps in a chunk. The loop skips a chunk without a valid step, so its
            time follows the longest row. The gradient saves the carries between chunks
            alone and computes each chunk again. Values are the same bit for bit. Under
            `jax.vmap` over the encoding nothing is skipped. The default is one plain
            loop, which is faster where rows fill the axis.

    Returns:
        `(carry, ys)`. `carry` is the carry after the last valid step of each row, in
        the direction of the scan; with several segments, of the last segment that is
        not empty. A row without a valid step returns its `carry_in`, or `init`. `ys`
        has the segment axis where `xs` has it, and is zero at padding.

    Raises:
        TypeError: `f` is no function, a leaf is no array, `f` does not return a pair,
            or its carry differs from `init` in structure, shape or dtype.
        ValueError: Not exactly one encoding is given, shapes or host values do not fit,
            as in `reverse_segments`, `unroll` or `chunk` is out of range, or the
            segment axis is sharded.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import scan_segments
        >>> def add(carry, x):
        ...     return carry + x, carry + x
        >>> xs = jnp.array([[1, 2, 3, 9], [4, 5, 9, 9]])
        >>> scan_segments(add, jnp.zeros(2, int), xs, jnp.array([3, 2]))
        (Array([6, 9], dtype=int32), Array([[1, 3, 6, 0],
               [4, 9, 0, 0]], dtype=int32))
        >>> episodes = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        >>> scan_segments(add, jnp.zeros(2, int), xs, segment_ids=episodes)[1]
        Array([[ 1,  3,  3, 12],
               [ 4,  5, 14, 23]], dtype=int32)

        The rows go on from the block before, until an episode starts:

        >>> before = jnp.array([100, 200])
        >>> firsts = jnp.array([[0, 0, 1, 0], [1, 0, 0, 0]], bool)
        >>> scan_segments(
        ...     add, jnp.zeros(2, int), xs, starts=firsts, carry_in=before
        ... )[1]
        Array([[101, 103,   3,  12],
               [204, 209, 218, 227]], dtype=int32)

    Source: `jax.lax.scan`; masks as in `tf.keras.layers.RNN`.
    """
    call = Call("scan_segments")
    _carry.check_callable(call, "f", f)
    unroll = _carry.check_unroll(call, unroll)
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    encodings.update(starts=starts, mask=mask, padding_id=padding_id)
    xs, segments, layout = parse_arrays(call, "xs", xs, axis, **encodings)
    batch, _ = layout.sizes(xs)
    init = _carry.carry_arrays(call, "init", init, batch)
    if carry_in is not None:
        carry_in = _carry.carry_arrays(call, "carry_in", carry_in, batch)
        _carry.check_carry_in(call, carry_in, "init", init)
    chunk = chunk if chunk is None else call.integer("chunk", chunk, 1)
    more = dict(reverse=call.flag("reverse", reverse), unroll=unroll, chunk=chunk)
    operands = init, carry_in, xs, segments
    return run(scan_rows, f, *operands, call=call, layout=layout, **more)


def bidirectional_scan(
    f: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Sequence[Any],
    init: Sequence[Any],
    xs: Any,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    starts: Any = None,
    mask: Any = None,
    padding_id: int | None = None,
    axis: int | None = None,
    unroll: int | bool = 1,
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Scans ragged rows in both directions at once, in one loop.

    Equal to two `scan_segments`, the second with `reverse=True`, each with its own
    parameters. Padding, even NaN, never affects outputs or gradients.

    Args:
        f: `f(params, carry, x) -> (carry, y)`: one step of all rows in one direction,
            as for `scan_segments`. It is mapped over the directions by `jax.vmap`.
        params: The pair (forward, backward): pytrees of arrays of the same structure,
            shapes and dtypes.
        init: The pair (forward, backward) of carries, each as for `scan_segments`.
        xs: Array or pytree of arrays of any dtype, `(*batch, T, ...)` by default.
        lengths: As for `scan_segments`, like the arguments after it.
        segment_ids: Integers that lie like `xs`.
        cu_seqlens: Integers of shape `(*batch, K + 1)`.
        starts: Booleans that lie like `xs`.
        mask: Booleans that lie like `xs`.
        padding_id: The id in `segment_ids` whose runs are padding.
        axis: The segment axis of each array in `xs`.
        unroll: Steps in one iteration of the loop.

    Returns:
        `((carry_forward, carry_backward), (ys_forward, ys_backward))`. The forward
        carry is the state after the last valid step of each row, the backward carry the
        state after its first. Both `ys` are in the order of `xs` and zero at padding.

    Raises:
        TypeError: `params` or `init` is no pair, or as `scan_segments`.
        ValueError: The members of a pair differ in structure, shape or dtype, or as
            `scan_segments`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import bidirectional_scan
        >>> def total(scale, carry, x):
        ...     carry = carry + scale * x
        ...     return carry, carry
        >>> xs = jnp.array([[1, 2, 3, 9], [4, 5, 9, 9]])
        >>> zeros = jnp.zeros(2, int)
        >>> carries, (forward, backward) = bidirectional_scan(
        ...     total, (1, 10), (zeros, zeros), xs, jnp.array([3, 2])
        ... )
        >>> forward
        Array([[1, 3, 6, 0],
               [4, 9, 0, 0]], dtype=int32)
        >>> backward
        Array([[60, 50, 30,  0],
               [90, 50,  0,  0]], dtype=int32)
        >>> carries
        (Array([6, 9], dtype=int32), Array([60, 90], dtype=int32))

    Source: M. Schuster, K. K. Paliwal, "Bidirectional recurrent neural networks", IEEE
    Transactions on Signal Processing 45 (1997).
    """
    call = Call("bidirectional_scan")
    _carry.check_callable(call, "f", f)
    unroll = _carry.check_unroll(call, unroll)
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    encodings.update(starts=starts, mask=mask, padding_id=padding_id)
    xs, segments, layout = parse_arrays(call, "xs", xs, axis, **encodings)
    params = _carry.check_pair(call, "params", params)
    inits = _carry.check_pair(call, "init", init, layout.sizes(xs)[0])
    static = dict(call=call, layout=layout, unroll=unroll)
    return run(scan_both_ways, f, params, inits, xs, segments, **static)


def associative_scan_segments(
    fn: Callable[[Any, Any], Any],
    elems: Any,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    cu_seqlens: Integers | None = None,
    starts: Any = None,
    padding_id: int | None = None,
    carry_in: Any = None,
    reverse: bool = False,
    axis: int | None = None,
    axis_name: AxisName | None = None,
) -> Any:
    """Combines the steps of each segment in parallel: `jax.lax.associative_scan`.

    Step `t` of the result combines the steps of its segment from the start to `t`, in
    O(log T) parallel rounds. The result is zero at padding. Padding, even NaN, never
    affects other outputs or gradients. On a CPU `scan_segments` is faster.

    Args:
        fn: Associative function `fn(a, b)` of two pytrees like `elems`, where `a` comes
            first in the direction of the scan: with `reverse=True`, `a` holds the later
            steps. It must work elementwise along the batch axes and the segment axis,
            as for `jax.lax.associative_scan`.
        elems: Array or pytree of arrays, `(*batch, T, ...)` by default.
        lengths: Integers of shape `batch`: one segment a row, from position 0. Exactly
            one of `lengths`, `segment_ids`, `cu_seqlens` and `starts` is given.
        segment_ids: Integers, one for each position: every maximal run of equal ids is
            a segment. They lie like `elems`: `(*batch, T)` by default, `(T, *batch)`
            with `axis=0`.
        cu_seqlens: Integers of shape `(*batch, K + 1)`: cumulative offsets from 0.
        starts: Booleans that lie like `segment_ids`, true at the first step of each
            segment. The first step of a row is a start, marked or not.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
        carry_in: Pytree like one step of `elems`, `(*batch, ...)`. It stands in front
            of the first segment of each row, in the direction of the scan.
        reverse: Combines from the end of each segment to `t`.
        axis: The segment axis of each array. The default is the axis right after the
            batch axes.
        axis_name: Inside `jax.shard_map`, the mesh axis, or a tuple of mesh axes, over
            which the segment axis is sharded. `elems`, `segment_ids` and `starts` are
            then local blocks; `lengths` and `cu_seqlens` describe the global axis. A
            device receives one element for each row and device.

    Returns:
        Pytree of the structure, shapes and dtypes of `elems`.

    Raises:
        TypeError: `fn` is no function, a leaf of `elems` is no array, or the result of
            `fn` differs from `elems` in structure, shape or dtype.
        ValueError: Not exactly one encoding is given, shapes or host values do not fit,
            as in `reverse_segments`, or the segment axis is sharded.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import associative_scan_segments
        >>> xs = jnp.array([1, 2, 3, 4, 5])
        >>> episodes = jnp.array([0, 0, 1, 1, 1])
        >>> associative_scan_segments(jnp.add, xs, segment_ids=episodes)
        Array([ 1,  3,  3,  7, 12], dtype=int32)
        >>> associative_scan_segments(jnp.add, xs, segment_ids=episodes, reverse=True)
        Array([ 3,  2, 12,  9,  5], dtype=int32)

    Source: G. E. Blelloch, "Prefix sums and their applications" (1990), section 1.5,
    segmented scans.
    """
    call = Call("associative_scan_segments", axis_name=axis_name)
    _carry.check_callable(call, "fn", fn)
    encodings = dict(lengths=lengths, segment_ids=segment_ids, cu_seqlens=cu_seqlens)
    encodings.update(starts=starts, padding_id=padding_id)
    elems, segments, layout = parse_arrays(call, "elems", elems, axis, **encodings)
    if carry_in is not None:
        batch, _ = layout.sizes(elems)
        carry_in = _carry.carry_arrays(call, "carry_in", carry_in, batch)
        step = _carry.one_step(elems, layout.axis)
        _carry.check_carry_in(call, carry_in, "one step of elems", step)
    reverse = call.flag("reverse", reverse)
    static = dict(call=call, layout=layout, reverse=reverse)
    return run(combine_rows, fn, elems, carry_in, segments, **static)

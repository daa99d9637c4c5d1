"""Both directions of a recurrence over ragged rows, in one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr

from jax_revseg import _compat
from jax_revseg._api import reverse_sequence
from jax_revseg._layout import Integers, Segments, as_array, ids, padded
from jax_revseg._lowering import padding_mask

_NAME = "bidirectional_scan"
_SMALL_STEP = 4096  # Elements of one direction's carry; measured on a CPU.


def _array(argument: str, leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError:
        raise TypeError(
            f"{_NAME}: {argument} has a leaf {leaf!r} of type {type(leaf).__name__}, "
            "but all must be arrays; close over the others in f."
        ) from None


def _stack(argument: str, pair: Any) -> Any:
    """The forward and the backward tree as one, with an axis of 2 in front."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            f"{_NAME}: {argument} has type {type(pair).__name__}, but must be a pair, "
            "(forward, backward)."
        )
    trees = [jax.tree.map(lambda leaf: _array(argument, leaf), tree) for tree in pair]
    forward, backward = map(jax.tree.structure, trees)
    if forward != backward:
        raise ValueError(
            f"{_NAME}: {argument} has the structure {forward} forward and {backward} "
            "backward; one loop needs them equal: use bidirectional for two models "
            "that differ."
        )

    def stack(path: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{_NAME}: {argument}{keystr(path)} is {a.dtype}{a.shape} forward and "
                f"{b.dtype}{b.shape} backward; one loop needs them equal: use "
                "bidirectional for two models that differ."
            )
        return jnp.stack([a, b])

    return jax.tree_util.tree_map_with_path(stack, *trees)


def _pair_of_inits(step: Callable[[Any], Any], init: Any) -> Any:
    """`init` twice if it is one carry, else `init`; `step` runs one step on a carry."""
    if type(init) is not tuple or len(init) != 2:
        return init, init
    # An LSTM's one carry is a tuple of two as well. What f makes of it decides.
    try:
        carry = jax.eval_shape(step, init)
        alone = jax.tree.structure(carry) == jax.tree.structure(init)
    except Exception as error:
        try:
            jax.eval_shape(step, init[0])
        except Exception:
            raise error from None  # It takes neither, so the fault is not in our guess.
        alone = False
    return (init, init) if alone else init


def _check_rows(argument: str, tree: Any, batch: tuple[int, ...]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(leaf)[: len(batch)] != batch:
            raise ValueError(
                f"{_NAME}: {argument}{keystr(path)} has shape {jnp.shape(leaf)}, but "
                f"its first axes must be the batch axes {batch}, one entry for each "
                "row; use jax.numpy.broadcast_to if they are equal."
            )


def _check_carry(new: Any, carry: Any) -> None:
    def describe(leaf: Any) -> str:
        return f"{jnp.result_type(leaf)}{jnp.shape(leaf)}"

    got, want = jax.tree.map(describe, new), jax.tree.map(describe, carry)
    if jax.tree.flatten(got) != jax.tree.flatten(want):
        raise TypeError(
            f"{_NAME}: f was given a carry of {want}, but returned one of {got}; make "
            "init and what f returns the same in structure, shapes and dtypes."
        )


def _select(mask: jax.Array, a: Any, b: Any) -> Any:
    """`a` in the rows where the mask is true, else `b`."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(lax.expand_dims(mask, range(mask.ndim, a.ndim)), a, b)

    return jax.tree.map(select, a, b)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _fill_padding(x: jax.Array, live: jax.Array) -> jax.Array:
    """A time-major array whose padding repeats the row's first valid step.

    So `f` meets nothing there that it does not meet in a valid step: zeros, or a carry
    run on past the row's end, could give a NaN derivative, and a NaN times a cotangent
    of zero is a NaN. A row without a valid step is zero.
    """
    if not x.shape[0]:
        return x
    index = jnp.argmax(live, 0, keepdims=True)
    index = lax.expand_dims(index, range(index.ndim, x.ndim))
    first = jnp.take_along_axis(x, index, 0, mode="promise_in_bounds")[0]
    # Its cotangent is zero, so nothing is lost by not scattering it back.
    first = lax.stop_gradient(_select(live.any(0), first, _zeros(first)))
    return _select(live, x, first[None])


def _one_direction(
    f: Callable[[Any, Any, Any], tuple[Any, Any]],
    unroll: int | bool,
    params: Any,
    init: Any,
    xs: Any,
    keep: jax.Array,
    live: jax.Array,
) -> tuple[Any, Any]:
    """Scans time-major rows: after a step that does not `keep`, from `init` again.

    Chosen before the next step, the carry fuses with that, which is the least to do;
    chosen where it is made, it leaves a large step's products to run side by side.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(init)]
    before = all(isinstance(n, int) for n in sizes) and sum(sizes) <= _SMALL_STEP
    if before:  # The last step's comes first, and meets `init`, which is the same.
        keep = jnp.roll(keep, 1, 0)

    def step(state: tuple[Any, Any], inputs: tuple[Any, jax.Array, jax.Array]):
        carry, last = state
        x, keep, live = inputs
        carry = _select(keep, carry, init) if before else carry
        new, y = f(params, carry, x)
        _check_carry(new, carry)
        _check_rows("a y of f", y, live.shape)
        last = _select(live, new, last)
        return (new if before else _select(keep, new, init), last), y

    (_, last), ys = lax.scan(step, (init, init), (xs, keep, live), unroll=unroll)
    return last, _select(live, ys, _zeros(ys))


def _masks(segments: Segments, size: int) -> tuple[jax.Array, jax.Array]:
    """After which steps to keep the carry, and which are valid: `(T, 2, *batch)`."""
    values, _, _, layout, padding_id = segments
    if layout == "padded":
        live = ~padding_mask(values, size, layout, padding_id)
        # Reversed it is the same, but checkify looks at what the reversal is given.
        values = live = reverse_sequence(live, values)
    elif padding_id is None:
        live = jnp.ones(values.shape, bool)
    else:
        live = ~padding_mask(values, size, layout, padding_id)
    # Around the end this compares the last step with the first, which does no harm: a
    # carry that leaves a direction's last step goes nowhere.
    keep = [live & (values == jnp.roll(values, shift, -1)) for shift in (-1, 1)]
    forward, backward, live = (jnp.moveaxis(mask, -1, 0) for mask in (*keep, live))
    keep = jnp.stack([forward, jnp.flip(backward, 0)], 1)
    return keep, jnp.stack([live, jnp.flip(live, 0)], 1)


def _vary_alike(tree: Any, others: Any) -> Any:
    """Has each leaf vary over the manual mesh axes that any of the others varies over.

    A loop must give back what it takes, and from the first step on its carry varies as
    `xs`, `params` and the masks do.
    """
    axes = [_compat.varying(jax.typeof(x)) for x in jax.tree.leaves((tree, others))]
    every = frozenset().union(*axes)
    return jax.tree.map(
        lambda x: _compat.pvary(x, every - _compat.varying(jax.typeof(x))), tree
    )


def bidirectional_scan(
    f: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Sequence[Any],
    init: Any,
    xs: Any,
    lengths: Integers | None = None,
    *,
    segment_ids: Integers | None = None,
    padding_id: int | None = None,
    axis: int | None = None,
    unroll: int | bool = 1,
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Scans ragged rows from both ends at once, in one loop.

    The forward direction takes each row's valid steps from the first to the last, the
    backward direction from the last to the first, each with its own parameters. Each
    carry that comes back is the state after the last valid step that its direction
    takes in the row; a row without a valid step gives its `init` back. With
    `segment_ids` the carry starts again from `init` at every segment, so that the
    forward carry is that of the row's last segment and the backward carry that of its
    first.

    What stands in the padding of `xs`, NaNs included, changes neither a value nor a
    gradient. In place of padding `f` gets the row's first step (of that direction)
    again, with `init`, and what it gives there is dropped: a step that is finite, with
    finite derivatives, wherever the row is valid stays so in the padding. In a row
    without a valid step `f` gets `init` and zeros.

    Lengths given as Python or NumPy values are checked at once. On a device, or traced,
    a negative length counts as 0 and one past the end as the size of the axis; under
    `jax.experimental.checkify` both raise.

    Args:
        f: `f(params, carry, x) -> (carry, y)`: one step on all rows. `carry`, `x` and
            `y` are pytrees of arrays whose first axes are the batch axes, and a row's
            results depend on that row alone. It is mapped over the two directions by
            `jax.vmap`.
        params: The pair (forward, backward): pytrees of arrays of the same structure,
            shapes and dtypes.
        init: The carry that a row starts from in both directions, or the pair (forward,
            backward) of them. A tuple of two is one carry if `f` takes it for one.
        xs: Array or pytree of arrays, any dtypes, `(*batch, T, ...)` by default.
        lengths: Integers, one for each row: shape `(*batch)`. Exactly one of `lengths`
            and `segment_ids`.
        segment_ids: Integers of shape `(*batch, T)`, for packed rows: every maximal run
            of equal ids is a segment.
        padding_id: The id in `segment_ids` whose runs are padding. By default no id is.
        axis: The segment axis of each array in `xs`. The default is the one right after
            the batch axes; 0 is time-major. The batch axes are the first others.
        unroll: How many steps one iteration of the loop takes, as for `jax.lax.scan`.

    Returns:
        `((carry_forward, carry_backward), (ys_forward, ys_backward))`. Both `ys` are in
        the order of `xs`, with the segment axis where `xs` has it, and zero at padding.

    Raises:
        TypeError: `params` is no pair, a leaf of it no array, `f` gives a carry of
            another structure, shape or dtype than it got, or as `reverse_segments`.
        ValueError: Not exactly one of `lengths` and `segment_ids` is given, the two
            `params` differ, `init` lacks the batch axes, the arrays in `xs` disagree
            about the segment axis, or as `reverse_segments`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax_revseg import bidirectional_scan
        >>> def total(scale, carry, x):
        ...     carry = carry + scale * x
        ...     return carry, carry
        >>> xs = jnp.array([[1, 2, 3, 9], [4, 5, 9, 9]])
        >>> carries, (forward, backward) = bidirectional_scan(
        ...     total, (1, 10), jnp.zeros(2, int), xs, jnp.array([3, 2])
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
    if (lengths is None) == (segment_ids is None):
        got = "none" if lengths is None else "both"
        raise ValueError(
            f"{_NAME}: got {got} of lengths and segment_ids; give exactly one of them."
        )
    if padding_id is not None and segment_ids is None:
        raise ValueError(
            f"{_NAME}: padding_id is {padding_id!r}, but the segments are given by "
            "lengths; padding_id goes with segment_ids only: leave it out."
        )
    leaves, treedef = jax.tree.flatten(xs)
    if not leaves:
        raise ValueError(
            f"{_NAME}: xs is {xs!r}, a pytree with no array in it; give at least 1."
        )
    which = f"{_NAME} (x is a leaf of xs)"
    leaves = [as_array(which, leaf) for leaf in leaves]

    def rows(leaf: jax.Array) -> Segments:
        if segment_ids is None:
            return padded(which, leaf, lengths, axis, None, 1)
        return ids(which, leaf, segment_ids, padding_id, axis, None, 1)

    found = [rows(leaf) for leaf in leaves]
    axes = {(s.axis, x.shape[s.axis]) for s, x in zip(found, leaves, strict=True)}
    if len(axes) > 1:
        raise ValueError(
            f"{_NAME}: the arrays in xs have shapes {[x.shape for x in leaves]}, which "
            f"puts (segment axis, its size) at {sorted(axes)}; they must agree. An "
            "axis that is not negative counts from the start."
        )
    segments = found[0]
    values, axis = segments.values, segments.axis
    size = leaves[0].shape[axis]
    batch = values.shape[: values.ndim - (segment_ids is not None)]
    leaves = [jnp.moveaxis(leaf, axis, 0) for leaf in leaves]

    def one_step(carry: Any) -> Any:
        x = [a[0] if size else jnp.zeros(a.shape[1:], a.dtype) for a in leaves]
        return f(params[0], carry, treedef.unflatten(x))[0]

    both = _stack("params", params)
    inits = _pair_of_inits(one_step, init)
    _check_rows("init", inits[0], batch)
    inits = _stack("init", inits)
    keep, live = _masks(segments, size)

    def both_ways(x: jax.Array) -> jax.Array:
        # From the end to the start a row's padding comes first: no reversal is needed.
        ways = enumerate((x, jnp.flip(x, 0)))
        return jnp.stack([_fill_padding(way, live[:, i]) for i, way in ways], 1)

    xs = treedef.unflatten(map(both_ways, leaves))
    inits = _vary_alike(inits, (both, xs, keep, live))
    one = partial(_one_direction, f, unroll)
    # vmap makes of one loop over two directions one loop that steps through both.
    carries, ys = jax.vmap(one, (0, 0, 1, 1, 1), (0, 1))(both, inits, xs, keep, live)

    def ordered(direction: int, y: jax.Array) -> jax.Array:
        if axis >= y.ndim - 1:
            raise ValueError(
                f"{_NAME}: axis is {axis}, but a y of f has shape {y.shape[2:]}, too "
                "few axes for ys with that one; put the segment axis of xs right after "
                "the batch axes."
            )
        y = y[:, direction]
        return jnp.moveaxis(jnp.flip(y, 0) if direction else y, 0, axis)

    forward, backward = (
        jax.tree.map(lambda leaf, i=i: leaf[i], carries) for i in (0, 1)
    )
    outputs = (jax.tree.map(partial(ordered, i), ys) for i in (0, 1))
    return (forward, backward), tuple(outputs)

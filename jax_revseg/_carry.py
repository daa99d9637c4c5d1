"""Carries and parameters: from a user's pytrees to what one loop can take, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from jax_revseg import _compat
from jax_revseg._arguments import Call, shown


def carry_arrays(call: Call, name: str, init: Any, batch: tuple[int, ...]) -> Any:
    """Returns `init` as a pytree of arrays that start with the batch axes."""

    def leaf(path: Any, value: Any) -> jax.Array:
        try:
            array = jnp.asarray(value)
        except TypeError:
            what = f"{name}{keystr(path)} is {shown(value)}, but must be an array"
            call.fail(f"{what}; close over anything else in f.", TypeError)
        check_batch(call, f"{name}{keystr(path)}", array, batch)
        return jnp.asarray(array, array.dtype)  # Not weak: a loop keeps its types.

    return tree_map_with_path(leaf, init)


def check_batch(call: Call, name: str, array: Any, batch: tuple[int, ...]) -> None:
    """Raises if an array does not start with the batch axes."""
    if np.shape(array)[: len(batch)] != batch:
        swap = ", or swap init and xs (or params)" * name.startswith("init")
        ids = "; for a mask or ids of integers use mask= (boolean) or segment_ids="
        call.fail(
            f"{name} has shape {np.shape(array)}, but its first axes must be the batch "
            f"axes {batch}, one entry for each row; use jax.numpy.broadcast_to if all "
            f"rows are equal{swap}{ids * (len(batch) > 1)}."
        )


def one_step(xs: Any, axis: int) -> Any:
    """Returns the shapes and dtypes of one step of arrays."""

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)

    return jax.tree.map(leaf, xs)


def types_of(tree: Any) -> Any:
    """Returns shapes and dtypes, such as `float32[3,2]`, without shardings."""
    return jax.tree.map(shown, tree)


def describe(tree: Any) -> Any:
    """Returns the types of a pytree, such as `float32[3,2]`, with shardings."""
    return jax.tree.map(lambda x: str(jax.typeof(x).update(weak_type=False)), tree)


def same_types(a: Any, b: Any) -> bool:
    """Whether two pytrees are equal in structure and types."""
    return jax.tree.flatten(describe(a)) == jax.tree.flatten(describe(b))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def check_step(call: Call, f: Callable[..., Any], batch: tuple[int, ...]):
    """Wraps `f(carry, x)`: raises if its result is no pair, or the carry changes."""
    pairs = call.function == "bidirectional_scan"

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        given = describe(carry)
        try:
            out = f(carry, x)
        except Exception as error:
            error.add_note(
                f"{call.function} gave f the carry {given} and x {describe(x)}, with "
                f"batch axes {batch}{'; init is a pair of carries' * pairs}"
                f"{'; a scalar length is that of one row' * (not batch)}."
            )
            raise
        if not _is_pair(out):
            what = f"f must return a pair (carry, y), but returned {types_of(out)}"
            remedy = "return (h, h) if the carry h is the output, (h, None) if none is"
            call.fail(f"{what}; {remedy}.", TypeError)
        new, y = out
        if not same_types(new, carry):
            hint = "and shardings: see jax.lax.pcast and jax.sharding.reshard"
            if same_types(tuple(out), carry):
                hint = "a cell's (h, c) is the carry alone: return ((h, c), h)"
            elif pairs:
                hint = "init is a pair of carries, for an LSTM ((h, c), (h, c))"
            what = (
                f"f was given a carry of {given}, but returned one of {describe(new)}"
            )
            remedy = f"make structure, shapes and dtypes equal ({hint})"
            call.fail(f"{what}; {remedy}.", TypeError)
        for path, leaf in tree_leaves_with_path(y):
            check_batch(call, f"y{keystr(path)} of f", leaf, batch)
        return new, y

    return step


def check_callable(call: Call, name: str, value: Any, remedy: str = "") -> None:
    """Raises if an argument is no function."""
    if not callable(value):
        what = f"{name} is {shown(value)}, but must be a function{remedy}"
        call.fail(f"{what}.", TypeError)


def check_carry_in(
    call: Call, value: Any, other: str, like: Any, name: str = "carry_in"
) -> None:
    """Raises unless `carry_in` has the structure, shapes and dtypes of `like`."""
    got, want = types_of(value), types_of(like)
    if jax.tree.flatten(got) != jax.tree.flatten(want):
        what = f"{name} is {got}, but must be {want}, like {other}"
        a, b = ([x.shape for x in jax.tree.leaves(tree)] for tree in (value, like))
        error = TypeError if a == b and name == "carry_in" else ValueError
        call.fail(f"{what}; make structure, shapes and dtypes equal.", error)


def check_unroll(call: Call, unroll: Any) -> int | bool:
    """Returns what every `lax.scan` takes: 0 means True from JAX 0.8 on."""
    if isinstance(unroll, bool):
        return unroll
    return call.integer("unroll", unroll, 0) or True


def check_pair(call: Call, name: str, pair: Any, batch: Any = ()) -> list[Any]:
    """Returns the pair (forward, backward) as arrays of equal shapes and dtypes."""
    if not _is_pair(pair):
        what = f"{name} must be a pair (forward, backward), but is {types_of(pair)}"
        call.fail(f"{what}.", TypeError)
    pair = carry_arrays(call, name, list(pair), batch)
    check_carry_in(call, pair[1], f"{name}[0]", pair[0], f"{name}[1]")
    return pair


def alike(call: Call, *trees: tuple[Any, Sequence[int]]) -> Iterator[Any]:
    """Gives the batch axes of all arrays one sharding, and one set of varying axes.

    A loop must return the types that it takes, and from the first step on its carry
    varies, and is sharded, as its inputs are. Each tree comes with its batch axes.
    """
    pairs = [(leaf, axes) for tree, axes in trees for leaf in jax.tree.leaves(tree)]
    merged: list[Any] = [None] * len(pairs[0][1])
    for x, axes in pairs:
        for i, a in enumerate(axes):
            name = jax.typeof(x).sharding.spec[a]
            if None not in (name, merged[i]) and name != merged[i]:
                call.fail(
                    f"batch axis {i} is sharded over {merged[i]!r} in one array and "
                    f"over {name!r} in another; use jax.sharding.reshard."
                )
            merged[i] = merged[i] or name
    arrays = [x for x, _ in pairs]
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = max(meshes, key=lambda mesh: len(mesh.explicit_axes))

    def leaf(x: jax.Array, axes: Sequence[int]) -> jax.Array:
        x = _compat.vary_like(x, *arrays)
        spec = list(jax.typeof(x).sharding.spec)
        for a, name in zip(axes, merged, strict=True):
            spec[a] = name
        return _compat.reshard_to(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return (jax.tree.map(lambda x, a=axes: leaf(x, a), tree) for tree, axes in trees)

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
from jax_revseg._arguments import Call


def carry_arrays(call: Call, name: str, init: Any, batch: tuple[int, ...]) -> Any:
    """Returns `init` as a pytree of arrays that start with the batch axes."""

    def leaf(path: Any, value: Any) -> jax.Array:
        array = leaf_array(call, f"{name}{keystr(path)}", value)
        check_batch(call, f"{name}{keystr(path)}", array, batch)
        return array

    return tree_map_with_path(leaf, init)


def leaf_array(call: Call, name: str, value: Any) -> jax.Array:
    """Returns a leaf as an array that is not weakly typed: a loop keeps its types."""
    try:
        array = jnp.asarray(value)
    except TypeError:
        call.fail(
            f"{name} is {value!r} of type {type(value).__name__}, but must be an "
            "array; close over anything else in f.",
            TypeError,
        )
    return jnp.asarray(array, array.dtype)


def check_batch(call: Call, name: str, array: Any, batch: tuple[int, ...]) -> None:
    """Raises if an array does not start with the batch axes."""
    if np.shape(array)[: len(batch)] != batch:
        call.fail(
            f"{name} has shape {np.shape(array)}, but its first axes must be the "
            f"batch axes {batch}, one entry for each row; use jax.numpy.broadcast_to "
            "if all rows are equal."
        )


def types_of(tree: Any) -> Any:
    """Returns shapes and dtypes, such as `float32[3,2]`, without shardings."""
    return jax.tree.map(lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}]", tree)


def describe(tree: Any) -> Any:
    """Returns the types of a pytree, such as `float32[3,2]`."""

    def leaf(leaf: Any) -> str:
        return str(jax.typeof(leaf).update(weak_type=False))

    return jax.tree.map(leaf, tree)


def same_types(a: Any, b: Any) -> bool:
    """Whether two pytrees are equal in structure and types."""
    return jax.tree.flatten(describe(a)) == jax.tree.flatten(describe(b))


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
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            call.fail(
                f"f must return a pair (carry, y), but returned {_kind(out)}; return "
                "(h, h) if the carry h is the output, and (h, None) if there is none.",
                TypeError,
            )
        new, y = out
        if not same_types(new, carry):
            hint = "and in sharding: see jax.lax.pcast and jax.sharding.reshard"
            if same_types(tuple(out), carry):
                hint = "a cell's (h, c) is the carry alone: return ((h, c), h)"
            elif pairs:
                hint = "init is a pair of carries, for an LSTM ((h, c), (h, c))"
            call.fail(
                f"f was given a carry of {given}, but returned one of {describe(new)}; "
                f"make structure, shapes and dtypes equal ({hint}).",
                TypeError,
            )
        for path, leaf in tree_leaves_with_path(y):
            check_batch(call, f"y{keystr(path)} of f", leaf, batch)
        return new, y

    return step


def check_callable(call: Call, name: str, value: Any, remedy: str = "") -> None:
    """Raises if an argument is no function."""
    if not callable(value):
        what = f"{name} is {repr(value)[:40]} of type {type(value).__name__}"
        call.fail(f"{what}, but must be a function{remedy}.", TypeError)


def check_carry_in(call: Call, carry_in: Any, name: str, like: Any) -> None:
    """Raises unless `carry_in` has the structure, shapes and dtypes of `like`."""
    got, want = types_of(carry_in), types_of(like)
    if jax.tree.flatten(got) != jax.tree.flatten(want):
        a, b = ([x.shape for x in jax.tree.leaves(tree)] for tree in (carry_in, like))
        call.fail(
            f"carry_in is {got}, but must be {want}, like {name}; make structure, "
            "shapes and dtypes equal.",
            TypeError if a == b else ValueError,
        )


def check_unroll(call: Call, unroll: Any) -> int | bool:
    """Returns what every `lax.scan` takes: 0 means True from JAX 0.8 on."""
    if isinstance(unroll, bool):
        return unroll
    if (unroll := call.integer("unroll", unroll)) < 0:
        call.fail(f"unroll is {unroll}; use 1 or more, or 0 or True for all steps.")
    return unroll or True


def check_pair(call: Call, name: str, pair: Any, batch: Any = ()) -> list[Any]:
    """Returns the pair (forward, backward) as arrays of equal shapes and dtypes."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        call.fail(
            f"{name} must be a pair (forward, backward), but is a {_kind(pair)}.",
            TypeError,
        )
    pair = [carry_arrays(call, f"{name}[{i}]", pair[i], batch) for i in (0, 1)]
    forward, backward = types_of(pair[0]), types_of(pair[1])
    if jax.tree.flatten(forward) != jax.tree.flatten(backward):
        call.fail(
            f"{name} is {forward} forward and {backward} backward; one loop needs them "
            "equal in structure, shapes and dtypes: use scan_segments twice."
        )
    return pair


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"


def alike(call: Call, *trees: tuple[Any, Sequence[int]]) -> Iterator[Any]:
    """Gives the batch axes of all arrays one sharding, and one set of varying axes.

    A loop must return the types that it takes, and from the first step on its carry
    varies, and is sharded, as its inputs are. Each tree comes with its batch axes.
    """
    arrays = [leaf for tree, _ in trees for leaf in jax.tree.leaves(tree)]
    pairs = [(leaf, axes) for tree, axes in trees for leaf in jax.tree.leaves(tree)]
    target = _merged_batch_sharding(call, pairs)

    def leaf(x: jax.Array, axes: Sequence[int]) -> jax.Array:
        x = _compat.vary_like(x, *arrays)
        if target is None:
            return x
        spec = list(jax.typeof(x).sharding.spec)
        for a, name in zip(axes, target.spec, strict=True):
            spec[a] = name
        return _compat.reshard_to(x, NamedSharding(target.mesh, PartitionSpec(*spec)))

    return (jax.tree.map(lambda x, a=axes: leaf(x, a), tree) for tree, axes in trees)


def _merged_batch_sharding(call: Call, pairs: Any) -> NamedSharding | None:
    meshes = [jax.typeof(x).sharding.mesh for x, _ in pairs]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return None
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
    return NamedSharding(mesh, PartitionSpec(*merged))

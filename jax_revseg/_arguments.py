"""Single arguments of a public call: arrays, integers, scalars, mesh axes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike

AxisName = str | tuple[str, ...]
BatchAxis = int | Sequence[int] | None
Integers = ArrayLike | Sequence[Any]  # ArrayLike leaves lists out.


_ROWS = (
    "convert it with jax.numpy.asarray; for rows of different lengths give "
    "np.concatenate(rows) and lengths=[len(row) for row in rows] to pack_segments"
)
_CONSTANT = "give an array, for a constant with jax.numpy.full_like"
_REMEDIES = {
    "MaskedArray": "use .filled",
    "PackedSequence": "use pad_packed_sequence, or .data (see migration.md)",
    "dict": "use jax.tree.map for a pytree",
    "float": _CONSTANT,
    "int": _CONSTANT,
    "list": _ROWS,
    "tuple": _ROWS,
}


class Call(NamedTuple):
    """One call of a public function, and how its messages name things.

    Attributes:
        function: The name of the public function.
        x_name: What messages call the array, `x` or a leaf such as `xs['a']`.
        axis_name: The mesh axes over which the segment axis is sharded.
    """

    function: str
    x_name: str = "x"
    axis_name: AxisName | None = None

    @property
    def reverses(self) -> bool:
        """Whether the function is a reversal, which `batch_axis` and others suit."""
        return self.function.startswith("reverse_")

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        """Raises an error that starts with the name of the function."""
        raise error(f"{self.function}: {message}")

    def array(self, x: Any) -> jax.Array:
        """Returns `x` as an array of rank 1 or more."""
        x = x if isinstance(x, jax.Array) else self._from_host(x)
        if x.ndim == 0:
            remedy = "x[None]" if self.reverses else "jax.numpy.full_like"
            self.fail(
                f"{self.x_name} has rank 0 (shape ()), but needs at least 1 axis, the "
                f"segment axis; give it one with {remedy}."
            )
        return x

    def _from_host(self, x: Any) -> jax.Array:
        kind = type(x).__name__
        known = hasattr(x, "__array__") or hasattr(x, "__jax_array__")
        if kind in _REMEDIES or not (known or hasattr(x, "__dlpack__")):
            remedy = _REMEDIES.get(kind, "convert it with jax.numpy.asarray")
            self.fail(
                f"{self.x_name} must be an array, but has type {kind}; {remedy}.",
                TypeError,
            )
        try:
            # Neither conversion copies. A NaN in the padding is no error.
            with jax.debug_nans(False), jax.debug_infs(False):
                return jnp.asarray(x if known else np.from_dlpack(x))
        except Exception as error:  # Each framework has its own for other devices.
            remedy = "convert it to a NumPy array of numbers first"
            if hasattr(x, "detach"):  # PyTorch, which NumPy lacks bfloat16 for.
                remedy = "use jax.dlpack.from_dlpack(x.detach()), after x.cpu()"
            what = f"{self.x_name} has dtype {getattr(x, 'dtype', None)}, type {kind}"
            self.fail(f"{what}, which JAX cannot take ({error}); {remedy}.", TypeError)

    def integer(self, argument: str, value: Any) -> int:
        """Returns a static integer."""
        try:
            return operator.index(value)
        except TypeError:
            what = f"{argument} is {value!r} of type {type(value).__name__}"
            self.fail(f"{what}; use an int.", TypeError)

    def flag(self, argument: str, value: Any) -> bool:
        """Returns a static boolean."""
        if not isinstance(value, (bool, np.bool_)):
            self.fail(f"{argument} is {value!r}; use True or False.", TypeError)
        return bool(value)

    def size(self, argument: str, value: Any) -> Any:
        """Returns a static size, which may be symbolic under `jax.export`."""
        if is_symbolic_dim(value):
            return value
        size = self.integer(argument, value)
        if size < 0:
            self.fail(f"{argument} is {size}; it must be 0 or more.")
        return size

    def scalar(self, value: Any, x: jax.Array) -> Any:
        """Casts `padding_value` to the dtype of the array, where it is, or raises."""
        if value is None:
            return None
        number = isinstance(value, (bool, int, float, complex))
        shape = () if number else getattr(value, "shape", None)
        if shape != ():
            what = f"has shape {shape}" if shape else f"is {value!r}"
            self.fail(
                f"padding_value {what}, but must be a scalar (shape ()); use "
                "jax.numpy.where for anything else.",
                ValueError if shape else TypeError,
            )
        on_device = isinstance(value, jax.Array)
        try:
            return (_device_scalar if on_device else _host_scalar)(value, x.dtype)
        except (TypeError, ValueError, OverflowError, AttributeError):
            self.fail(
                f"padding_value is {value!r}, which {self.x_name} with dtype {x.dtype} "
                "cannot hold; use a scalar of that dtype.",
                TypeError,
            )

    def integers(self, argument: str, given: Any) -> Any:
        """Returns integers where they are: on the host or on a device."""
        values = self._from_any(argument, given)
        if values.dtype.kind in "iu":
            return values
        if jnp.issubdtype(values.dtype, jnp.integer):  # Kind V: int4 and its like.
            return values.astype(np.int32) if isinstance(values, np.ndarray) else values
        remedy = f"use .astype(int), or swap {self.x_name} and {argument}"
        if values.dtype == bool:
            remedy = "give a mask of valid steps as mask= to a scan or bidirectional, "
            remedy += "as segment_ids=mask.astype(int), padding_id=0 to "
            remedy += "reverse_segments; give flags of first steps as starts="
        what = f"{argument} has dtype {values.dtype}, but must be integers"
        self.fail(f"{what}; {remedy}.", TypeError)

    def booleans(self, argument: str, given: Any) -> Any:
        """Returns a mask where it is: on the host or on a device."""
        values = self._from_any(argument, given)
        if values.dtype != bool:
            self.fail(
                f"{argument} has dtype {values.dtype}, but must be boolean; compare it "
                "with 0, or give lengths as lengths= and ids as segment_ids=.",
                TypeError,
            )
        return values

    def _from_any(self, argument: str, given: Any) -> Any:
        """Converts with jnp if any leaf is on a device, else with NumPy."""
        if isinstance(given, jax.Array):
            return given
        if isinstance(given, np.ma.MaskedArray):
            self.fail(f"{argument} is a masked array; use .filled.", TypeError)
        leaves = jax.tree.leaves(given)
        on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        on_device |= hasattr(given, "__jax_array__")
        try:
            values: Any = (jnp if on_device else np).asarray(given)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(f"{argument} is not an array: {error}")
        if values.size == 0 and not hasattr(given, "dtype"):
            return values.astype(np.int32)  # NumPy makes floats of [].
        if values.dtype.kind in "OSUm":
            what = f"{argument} is {given!r} of type {type(given).__name__}"
            self.fail(f"{what}; give integers of 64 bits at most.", TypeError)
        return values

    @property
    def devices(self) -> int:
        """The number of blocks into which the segment axis is sharded."""
        name = self.axis_name
        if name is None:
            return 1
        names = name if isinstance(name, tuple) else (name,)
        strings = bool(names) and all(isinstance(n, str) for n in names)
        with suppress(NameError):
            if strings and len(set(names)) == len(names):
                return lax.axis_size(name)
        self.fail(
            f"axis_name is {name!r}, but must name axes that are mapped here, each "
            "once, as a string or a tuple of strings; call inside jax.shard_map, or "
            "leave axis_name out where the segment axis is not sharded.",
            ValueError if strings else TypeError,
        )


def _device_scalar(value: Any, dtype: Any) -> jax.Array:
    if value.dtype == dtype:  # Extended dtypes, those of keys, are never promoted.
        return value
    if jnp.result_type(dtype, value) != dtype:
        raise TypeError
    return value.astype(dtype)


def _host_scalar(value: Any, dtype: Any) -> np.ndarray:
    """Casts the value, whatever its own dtype is, as JAX does for Python scalars."""
    if isinstance(value, np.ma.MaskedArray):  # The mask would be lost.
        raise TypeError
    dtype, given = np.dtype(dtype), np.asarray(value).item()
    kind: Any = float if jnp.issubdtype(dtype, jnp.floating) else int
    kind = complex if jnp.issubdtype(dtype, jnp.complexfloating) else kind
    with np.errstate(all="ignore"):
        cast = np.asarray(kind(given)).astype(dtype)
    back = kind(cast)
    # Floats may round below their largest value; integers and booleans may not.
    limit = -1 if kind is int else float(jnp.finfo(dtype).max)
    for a, b in ((given.real, back.real), (given.imag, back.imag)):
        same = a == b or (a != a and b != b)  # Both may be NaN.
        if not (same or (abs(a) <= limit and np.isfinite(b))):
            raise ValueError
    return cast

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
from jax.typing import ArrayLike

AxisName = str | tuple[str, ...]
BatchAxis = int | Sequence[int] | None
Integers = ArrayLike | Sequence[Any]  # ArrayLike leaves lists out.


_CONSTANT = "give an array, for a constant with jax.numpy.full_like"
_ROWS = (
    "use jax.numpy.asarray, or swap x and lengths; for rows of different lengths give "
    "np.concatenate(rows) and lengths=[len(row) for row in rows] to pack_segments"
)
_REMEDIES = {
    "MaskedArray": "use .filled",
    "PackedSequence": "use pad_packed_sequence, or .data (see migration.md)",
    "Tensor": "use jax.dlpack.from_dlpack(x.detach()), after x.cpu()",
    "dict": "use jax.tree.map for a pytree",
    "float": _CONSTANT,
    "int": _CONSTANT,
    "list": _ROWS,
    "tuple": _ROWS,
}


def shown(value: Any) -> str:
    """How messages show a value; an array by its type, such as `float32[2,3]`."""
    on_device = isinstance(value, (jax.Array, jax.ShapeDtypeStruct))
    what = "" if on_device else f" of type {type(value).__name__}"
    if on_device or getattr(value, "ndim", 0):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]{what}"
    return f"{' '.join(repr(value).split())[:60]}{what}"


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
        try:
            array = x if isinstance(x, jax.Array) else _from_host(x)
        except Exception:  # Each framework has its own for other devices.
            kind = "Tensor" if hasattr(x, "detach") else type(x).__name__
            remedy = _REMEDIES.get(kind, "convert it to a NumPy array of numbers first")
            what = f"{self.x_name} must be an array, but is {shown(x)}"
            self.fail(f"{what}; {remedy}.", TypeError)
        if array.ndim == 0:
            what = f"{self.x_name} has rank 0 (shape ()), but needs a segment axis"
            self.fail(f"{what}; use x[None], or jax.numpy.full_like for a constant.")
        return array

    def integer(self, argument: str, value: Any, least: float = -np.inf) -> int:
        """Returns a static integer."""
        try:
            value = operator.index(value)
        except TypeError:
            self.fail(f"{argument} is {shown(value)}; use an int.", TypeError)
        if value < least:
            self.fail(f"{argument} is {value}; it must be {least} or more.")
        return value

    def flag(self, argument: str, value: Any) -> bool:
        """Returns a static boolean."""
        if not isinstance(value, (bool, np.bool_)):
            self.fail(f"{argument} is {shown(value)}; use True or False.", TypeError)
        return bool(value)

    def scalar(self, value: Any, x: jax.Array) -> Any:
        """Casts `padding_value` to the dtype of the array, where it is, or raises."""
        if value is None:
            return None
        cast = _device_scalar if isinstance(value, jax.Array) else _host_scalar
        try:
            return cast(value, x.dtype)
        except (TypeError, ValueError, OverflowError, AttributeError):
            what = f"padding_value is {shown(value)}, but must be a scalar (shape ())"
            holds = f"that {self.x_name} with dtype {x.dtype} can hold"
            error = ValueError if getattr(value, "shape", ()) else TypeError
            self.fail(f"{what} {holds}; use jax.numpy.where for others.", error)

    def values(self, argument: str, given: Any, boolean: bool = False) -> Any:
        """Returns integers or booleans where they are: on the host or on a device."""
        try:
            values = given if isinstance(given, jax.Array) else _from_any(given)
        except (TypeError, ValueError, OverflowError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            self.fail(f"{argument} is not an array: {error}.", kind)
        if values.dtype.kind in ("b" if boolean else "iu"):
            return values
        remedy = f"use .astype(int), or swap {self.x_name} and {argument}"
        if boolean:
            remedy = "compare with 0, or give lengths as lengths=, ids as segment_ids="
        elif values.dtype == bool:
            remedy = (
                "give a mask as mask= to a scan or bidirectional, to others as "
                "segment_ids=mask.astype(int), padding_id=0; give first steps as "
                "starts="
            )
        elif jnp.issubdtype(values.dtype, jnp.integer):  # Kind V: int4 and its like.
            return values.astype(np.int32) if isinstance(values, np.ndarray) else values
        what = f"{argument} is {shown(given)}, but must be"
        kind = "booleans" if boolean else "integers of 64 bits at most"
        self.fail(f"{what} {kind}; {remedy}.", TypeError)

    @property
    def devices(self) -> int:
        """The number of blocks into which the segment axis is sharded."""
        name = self.axis_name
        if name is None:
            return 1
        names = name if isinstance(name, tuple) else (name,)
        strings = name != () and all(isinstance(n, str) for n in names)
        with suppress(NameError):
            if strings and len({*names}) == len(names):
                return lax.axis_size(name)
        self.fail(
            f"axis_name is {name!r}, but must name axes that are mapped here, each "
            "once, as a string or a tuple of strings; call inside jax.shard_map, or "
            "leave axis_name out where the segment axis is not sharded.",
            ValueError if strings else TypeError,
        )


def _from_host(x: Any) -> jax.Array:
    """Converts without a copy. A NaN in the padding is no error."""
    known = hasattr(x, "__array__") or hasattr(x, "__jax_array__")
    with jax.debug_nans(False), jax.debug_infs(False):
        return jnp.asarray(x if known else np.from_dlpack(x))


def _from_any(given: Any) -> Any:
    """Converts with jnp if any leaf is on a device, else with NumPy."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError("it is masked; use .filled")
    leaves = jax.tree.leaves(given)
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    numpy: Any = jnp if on_device or hasattr(given, "__jax_array__") else np
    values = numpy.asarray(given)
    # NumPy makes floats of [].
    return values if values.size or hasattr(given, "dtype") else values.astype(np.int32)


def _device_scalar(value: Any, dtype: Any) -> jax.Array:
    same = value.dtype == dtype  # Extended dtypes, those of keys, are never promoted.
    if value.ndim or not (same or jnp.result_type(dtype, value) == dtype):
        raise TypeError
    return value if same else value.astype(dtype)


def _host_scalar(value: Any, dtype: Any) -> np.ndarray:
    """Casts the value, whatever its own dtype is, as JAX does for Python scalars."""
    if np.shape(value) or isinstance(value, np.ma.MaskedArray):  # The mask is lost.
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

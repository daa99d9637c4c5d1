"""Single arguments of a public call: arrays, integers, scalars, mesh axes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
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
        if not isinstance(x, jax.Array):
            x = self._from_host(x)
        if x.ndim == 0:
            remedy = "give it one with x[None]"
            if not self.reverses:
                remedy = "for a constant use jax.numpy.full_like of another array"
            self.fail(
                f"{self.x_name} has rank 0 (shape ()), but needs at least 1 axis, the "
                f"segment axis; {remedy}."
            )
        return x

    def _from_host(self, x: Any) -> jax.Array:
        kind, known = type(x).__name__, hasattr(x, "__array__")
        known |= hasattr(x, "__jax_array__")
        if isinstance(x, np.ma.MaskedArray) or not (known or hasattr(x, "__dlpack__")):
            remedy = "convert it with jax.numpy.asarray, and a pytree with jax.tree.map"
            if kind == "PackedSequence":
                remedy = "use pad_packed_sequence, or .data: see migration.md"
            elif isinstance(x, np.ma.MaskedArray):
                remedy = "use .filled"
            elif isinstance(x, (list, tuple)) and any(map(np.ndim, x)):
                remedy = "for rows of different lengths use np.concatenate(rows) with "
                remedy += "lengths=[len(row) for row in rows], and pack_segments"
            elif not self.reverses and np.isscalar(x):
                remedy = "for a constant use jax.numpy.full_like of another array"
            self.fail(
                f"{self.x_name} must be an array, but has type {kind}; {remedy}.",
                TypeError,
            )
        try:
            # Neither conversion copies.
            return jnp.asarray(x if known else np.from_dlpack(x))
        except Exception as error:  # Each framework has its own for other devices.
            remedy = "convert it to a NumPy array of numbers first"
            if hasattr(x, "__dlpack__") and not isinstance(x, np.ndarray):
                remedy = "use jax.dlpack.from_dlpack(x), after x.detach() and x.cpu() "
                remedy += "where the error asks for them"
            self.fail(
                f"{self.x_name} has dtype {getattr(x, 'dtype', None)} and type {kind}, "
                f"which JAX cannot take ({error}); {remedy}.",
                TypeError,
            )

    def integer(self, argument: str, value: Any) -> int:
        """Returns a static integer."""
        try:
            return operator.index(value)
        except TypeError:
            self.fail(
                f"{argument} is {value!r} of type {type(value).__name__}; use an int.",
                TypeError,
            )

    def flag(self, argument: str, value: Any) -> bool:
        """Returns a static boolean."""
        if isinstance(value, jax.Array):
            self.fail(f"{argument} is {value!r}; use a Python bool.", TypeError)
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
        dtype = x.dtype
        host = isinstance(value, (bool, int, float, complex))
        host |= hasattr(value, "__array__") and not isinstance(value, jax.Array)
        shape = np.shape(value) if host else getattr(value, "shape", None)
        if shape != ():
            self.fail(
                f"padding_value {f'has shape {shape}' if shape else f'is {value!r}'}, "
                "but must be a scalar (shape ()); use jax.numpy.where for anything "
                "else.",
                ValueError if shape else TypeError,
            )
        try:
            return (_host_scalar if host else _device_scalar)(value, dtype)
        except (TypeError, ValueError, OverflowError):
            self.fail(
                f"padding_value is {value!r}, which {self.x_name} with dtype {dtype} "
                f"cannot hold; use a scalar that {dtype} holds.",
                TypeError,
            )

    def integers(self, argument: str, given: Any) -> Any:
        """Returns integers where they are: on the host or on a device."""
        values = self._from_any(argument, given)
        if values.dtype.kind in "iu":
            return values
        if jnp.issubdtype(values.dtype, jnp.integer):  # Kind V: int4 and its like.
            return values.astype(np.int32) if isinstance(values, np.ndarray) else values
        remedy = "convert them with .astype(int)"
        if values.dtype == bool:
            mask = "segment_ids=mask.astype(int), padding_id=0"
            if self.reverses:
                mask = f"segment_ids in reverse_segments: {mask}"
            elif self.function != "associative_scan_segments":
                mask = "mask="
            remedy = f"give a mask of valid steps as {mask}, and flags that are true "
            remedy += "where a segment starts as starts="
        elif argument == "lengths" and values.ndim > 1:
            remedy += f", or are {self.x_name} and lengths swapped?"
        self.fail(
            f"{argument} has dtype {values.dtype}, but must be integers; {remedy}.",
            TypeError,
        )

    def booleans(self, argument: str, given: Any) -> Any:
        """Returns a mask where it is: on the host or on a device."""
        values = self._from_any(argument, given)
        if values.dtype == bool:
            return values
        self.fail(
            f"{argument} has dtype {values.dtype}, but must be boolean; use "
            f"{argument} != 0, or give lengths as lengths= and ids as segment_ids=.",
            TypeError,
        )

    def _from_any(self, argument: str, given: Any) -> Any:
        """Converts with jnp if any leaf is on a device, else with NumPy."""
        if isinstance(given, jax.Array):
            return given
        if isinstance(given, np.ma.MaskedArray):
            self.fail(
                f"{argument} is a masked array, whose mask would be lost; use .filled.",
                TypeError,
            )
        on_device = hasattr(given, "__jax_array__") or any(
            isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)
        )
        try:
            values: Any = (jnp if on_device else np).asarray(given)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(f"{argument} is not an array: {error}")
        if values.size == 0 and not hasattr(given, "dtype"):
            return values.astype(np.int32)  # NumPy makes floats of [].
        if values.dtype.kind in "OSUm":
            self.fail(
                f"{argument} is {given!r} of type {type(given).__name__}; give an "
                "array of integers of 64 bits at most.",
                TypeError,
            )
        return values

    @property
    def devices(self) -> int:
        """The number of blocks into which the segment axis is sharded."""
        name = self.axis_name
        if name is None:
            return 1
        names = name if isinstance(name, tuple) else (name,)
        if not names or not all(isinstance(n, str) for n in names):
            self.fail(
                f"axis_name is {name!r}; use the name of a mesh axis, or a tuple of "
                "names.",
                TypeError,
            )
        try:
            if len(set(names)) == len(names):
                return lax.axis_size(name)
        except NameError:
            pass
        self.fail(
            f"axis_name is {name!r}, but must name axes that are mapped here, each "
            "once; call inside jax.shard_map over a mesh that has them, or leave "
            "axis_name out where the segment axis is not sharded."
        )


def _device_scalar(value: Any, dtype: Any) -> jax.Array:
    # Extended dtypes, those of keys, take part in no promotion.
    if value.dtype != dtype and jnp.result_type(dtype, value) != dtype:
        raise TypeError
    return value if value.dtype == dtype else value.astype(dtype)


def _host_scalar(value: Any, dtype: Any) -> np.ndarray:
    """Casts the value, whatever its own dtype is, as JAX does for Python scalars."""
    if isinstance(value, np.ma.MaskedArray):  # The mask would be lost.
        raise TypeError
    dtype = np.dtype(dtype)
    value = np.asarray(value).item() if hasattr(value, "__array__") else value
    if dtype.kind == "b" or jnp.issubdtype(dtype, jnp.integer):
        number = int(value)
        info = None if dtype.kind == "b" else jnp.iinfo(dtype)
        low, high = (info.min, info.max) if info else (0, 1)
        fits = value == number and low <= number <= high
        cast = np.asarray(number if fits else 0).astype(dtype)
    else:
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        number: Any = np.asarray(value, complex if is_complex else float)
        limit = float(jnp.finfo(dtype).max)
        parts = [part for part in (number.real, number.imag) if np.isfinite(part)]
        with np.errstate(all="ignore"):
            cast = number.astype(dtype)
        # Small formats lack infinity, NaN, zero or the sign.
        back = cast.astype(number.dtype)
        fits = np.isnan(back) == np.isnan(number) and np.isinf(back) == np.isinf(number)
        fits = fits and all(abs(part) <= limit for part in parts)
    if not fits:
        raise ValueError
    return cast

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


class Constant(NamedTuple):
    """A host scalar that can be a static argument: bits, so that -0.0 is not 0.0."""

    bits: bytes
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """Returns the scalar as a NumPy array of rank 0."""
        return np.frombuffer(self.bits, self.dtype).reshape(())


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

    def fail(self, message: str, error: type[Exception] = ValueError) -> NoReturn:
        """Raises an error that starts with the name of the function."""
        raise error(f"{self.function}: {message}")

    def array(self, x: Any) -> jax.Array:
        """Returns `x` as an array of rank 1 or more."""
        if not isinstance(x, jax.Array):
            x = self._from_host(x)
        if x.ndim == 0:
            self.fail(
                f"{self.x_name} has rank 0 (shape ()), but needs at least 1 axis to "
                "reverse; give it one with x[None]."
            )
        return x

    def _from_host(self, x: Any) -> jax.Array:
        known = hasattr(x, "__array__") or hasattr(x, "__jax_array__")
        if isinstance(x, np.ma.MaskedArray) or not (known or hasattr(x, "__dlpack__")):
            self.fail(
                f"{self.x_name} must be an array, but has type {type(x).__name__}; "
                "convert it with jax.numpy.asarray (a masked array with .filled, a "
                "pytree with jax.tree.map).",
                TypeError,
            )
        try:
            # Neither conversion copies.
            return jnp.asarray(x if known else np.from_dlpack(x))
        except Exception as error:  # Each framework has its own for other devices.
            self.fail(
                f"{self.x_name} has dtype {getattr(x, 'dtype', None)} and type "
                f"{type(x).__name__}, which JAX cannot take ({error}); convert it to a "
                "NumPy array of numbers first.",
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

    def size(self, argument: str, value: Any) -> Any:
        """Returns a static size, which may be symbolic under `jax.export`."""
        if is_symbolic_dim(value):
            return value
        size = self.integer(argument, value)
        if size < 0:
            self.fail(f"{argument} is {size}; it must be 0 or more.")
        return size

    def scalar(self, value: Any, x: jax.Array) -> Constant | jax.Array | None:
        """Casts `padding_value` to the dtype of the array, or raises."""
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
        if values.dtype.kind in "iuO":
            return values
        if jnp.issubdtype(values.dtype, jnp.integer):  # Kind V: int4 and its like.
            return values.astype(np.int32) if isinstance(values, np.ndarray) else values
        remedy = "convert them with .astype(int)"
        if values.dtype == bool:
            remedy = "a mask goes into reverse_segments, as "
            remedy += "segment_ids=mask.astype(int), padding_id=0 (in scans, as mask=)"
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
            f"{argument} != 0, or give lengths as lengths=.",
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
        if (
            values.dtype.kind in "fO"
            and str(getattr(given, "dtype", "object")) == "object"
        ):
            # NumPy makes floats of [] and of [1, 2**63]: let the elements decide.
            elements = np.asarray(given, object)
            if all(isinstance(element, int) for element in elements.flat):
                return elements if elements.size else elements.astype(np.int32)
        if values.dtype.kind in "OSUm":
            self.fail(
                f"{argument} is {given!r} of type {type(given).__name__}; give an "
                "array of integers.",
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


def split_constant(value: Constant | jax.Array | None) -> tuple[Constant | None, Any]:
    """Splits a scalar into its static form, if on the host, and its traced form."""
    return (value, None) if isinstance(value, Constant) else (None, value)


def _device_scalar(value: Any, dtype: Any) -> jax.Array:
    # Extended dtypes, those of keys, take part in no promotion.
    if value.dtype != dtype and jnp.result_type(dtype, value) != dtype:
        raise TypeError
    return value if value.dtype == dtype else value.astype(dtype)


def _host_scalar(value: Any, dtype: Any) -> Constant:
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
    return Constant(cast.tobytes(), dtype)

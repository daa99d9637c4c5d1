"""Single arguments of a public call: arrays, integers, scalars, names of mesh axes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

AxisName = str | tuple[str, ...]
BatchAxis = int | Sequence[int] | None
Integers = ArrayLike | Sequence[Any]  # ArrayLike leaves lists out.
Implementation = Literal["xla", "pallas"]


class Constant(NamedTuple):
    """A host scalar that can be a static argument: bits, so that -0.0 is not 0.0."""

    bits: bytes
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """Returns the scalar as a NumPy array of rank 0."""
        return np.frombuffer(self.bits, self.dtype).reshape(())


def split_constant(value: Constant | jax.Array) -> tuple[Constant | None, Any]:
    """Splits a scalar into its static form, if on the host, and its traced form."""
    return (value, None) if isinstance(value, Constant) else (None, value)


class Call(NamedTuple):
    """One call of a public function: its name and its array, for the messages.

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
        known = isinstance(x, (np.ndarray, np.generic)) or hasattr(x, "__jax_array__")
        if isinstance(x, np.ma.MaskedArray) or not (known or hasattr(x, "__dlpack__")):
            self.fail(
                f"{self.x_name} must be an array, but has type {type(x).__name__}; "
                "convert it with jax.numpy.asarray (or use jax.tree.map for a pytree, "
                ".filled(value) for a masked array).",
                TypeError,
            )
        try:
            return jnp.asarray(x if known else np.from_dlpack(x))
        except Exception as error:
            self.fail(
                f"{self.x_name} of type {type(x).__name__} and dtype "
                f"{getattr(x, 'dtype', None)} is no array that JAX can take: {error}; "
                "convert it to a NumPy array of numbers first.",
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
        if jax.export.is_symbolic_dim(value):
            return value
        size = self.integer(argument, value)
        if size < 0:
            self.fail(f"{argument} is {size}; it must be 0 or more.")
        return size

    def implementation(self, value: Any) -> Any:
        """Returns the name of an implementation, or None."""
        names = get_args(Implementation)
        if value is None or (isinstance(value, str) and value in names):
            return value
        self.fail(f"implementation is {value!r}; use None or one of {names}.")

    def scalar(self, value: Any, dtype: Any) -> Constant | jax.Array | None:
        """Casts `padding_value` to the dtype of the array, or raises."""
        if value is None:
            return None
        if isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)):
            shape, convert = np.shape(value), _host_scalar
        else:
            shape, convert = np.shape(value), _device_scalar
        if shape:
            self.fail(
                f"padding_value has shape {shape}, but must be a scalar (shape ()); use "
                "jax.numpy.where for anything else."
            )
        try:
            return convert(value, dtype)
        except (TypeError, ValueError, OverflowError):
            self.fail(
                f"padding_value is {value!r}, which {self.x_name} with dtype {dtype} "
                f"cannot hold; use a scalar that {dtype} holds, or convert "
                f"{self.x_name} first.",
                TypeError,
            )

    def integers(self, argument: str, given: Any) -> Any:
        """Returns integers where they are: on the host or on a device."""
        values = self._from_any(argument, given)
        # Kind V holds int4 and its like.
        if values.dtype.kind in "iuO" or jnp.issubdtype(values.dtype, jnp.integer):
            return values
        remedy = "convert them with .astype(int)"
        if jnp.issubdtype(values.dtype, jnp.bool_):
            remedy = "a mask goes into reverse_segments, as "
            remedy += "segment_ids=mask.astype(int), padding_id=0 (in scans, as mask=)"
        self.fail(
            f"{argument} has dtype {values.dtype}, but must be integers; {remedy}.",
            TypeError,
        )

    def booleans(self, argument: str, given: Any) -> Any:
        """Returns a mask where it is: on the host or on a device."""
        values = self._from_any(argument, given)
        if jnp.issubdtype(values.dtype, jnp.bool_):
            return values
        self.fail(
            f"{argument} has dtype {values.dtype}, but must be boolean; use "
            f"{argument} != 0, or give lengths as lengths=.",
            TypeError,
        )

    def _from_any(self, argument: str, given: Any) -> Any:
        """Converts with jnp if any leaf is on a device, else with NumPy."""
        if isinstance(given, np.ma.MaskedArray):
            self.fail(
                f"{argument} is a masked array, whose mask would be lost; use .filled.",
                TypeError,
            )
        if isinstance(given, (jax.Array, np.ndarray)):
            return given
        on_device = hasattr(given, "__jax_array__") or any(
            isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(given)
        )
        try:
            values: Any = (jnp if on_device else np).asarray(given)
            if not on_device and values.dtype.kind in "fO":
                # NumPy makes floats of [] and of [1, 2**63]: let the elements decide.
                elements = np.asarray(given, object)
                integers = all(type(element) is int for element in elements.flat)
                values = elements if integers else np.asarray(given, float)
            return values
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(
                f"{argument} is {given!r} of type {type(given).__name__}, which is no "
                f"array of numbers ({error}); give an array.",
                TypeError,
            )

    @property
    def devices(self) -> int:
        """The number of blocks that the segment axis is sharded into."""
        name = self.axis_name
        if name is None:
            return 1
        names = name if isinstance(name, tuple) else (name,)
        if not names or not all(isinstance(n, str) for n in names):
            self.fail(
                f"axis_name is {name!r}; use the name of a mesh axis, a str, or a "
                "tuple of names.",
                TypeError,
            )
        if len(set(names)) < len(names):
            self.fail(f"axis_name is {name!r}, which names an axis twice.")
        try:
            return lax.axis_size(name)
        except NameError:
            self.fail(
                f"axis_name is {name!r}, but no such axis is mapped here; call inside "
                "jax.shard_map over a mesh that has it, or leave axis_name out where "
                "the segment axis is not sharded."
            )


def _device_scalar(value: Any, dtype: Any) -> jax.Array:
    # Extended dtypes, those of keys, take part in no promotion.
    if value.dtype == dtype:
        return value
    if jnp.result_type(dtype, value) != dtype:
        raise TypeError
    return value.astype(dtype)


def _host_scalar(value: Any, dtype: Any) -> Constant:
    """Casts the value, whatever its own dtype is, as JAX does for Python scalars."""
    dtype = np.dtype(dtype)
    value = value.item() if isinstance(value, np.generic | np.ndarray) else value
    if jnp.issubdtype(dtype, jnp.integer) or dtype == bool:
        number = int(value)
        info = None if dtype == bool else jnp.iinfo(dtype)
        low, high = (info.min, info.max) if info else (0, 1)
        fits = value == number and low <= number <= high
        cast = np.asarray(number if fits else 0).astype(dtype)
    else:
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        number = np.asarray(value, complex if is_complex else float)
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

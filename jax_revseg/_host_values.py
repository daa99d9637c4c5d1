"""Lengths, offsets and ids on the host, checked against the segment axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jax_revseg._arguments import Call
from jax_revseg._layout import Layout
from jax_revseg._lowering import position_dtype


class HostValues(NamedTuple):
    """An encoding on the host, with the shape of `x`."""

    call: Call
    x_shape: tuple[int, ...]
    name: str
    values: np.ndarray
    layout: Layout

    def checked(self) -> tuple[np.ndarray, Layout]:
        """Returns segments in the dtype of positions; raises for a bad value."""
        if self.layout.kind in ("mask", "starts"):
            self._refuse_equal_blocks()
            return self.values, self.layout
        if self.layout.kind == "ids":
            return self._ids()
        check = self._offsets if self.name == "cu_seqlens" else self._lengths
        return _as_positions(check(), self._size), self.layout

    @property
    def _size(self) -> Any:
        """The global size of the segment axis."""
        return self.x_shape[self.layout.axis] * self.call.devices

    @property
    def _limit(self) -> str:
        over = f" over {self.call.devices} devices" if self.call.devices > 1 else ""
        at = f"axis {self.layout.axis} of {self.call.x_name}{over}"
        return f"{self._size}, the size of {at}"

    def _raise_at(self, bad: Any, rule: str, name: str = "", values: Any = None):
        """Raises for the first value that breaks a rule."""
        if np.any(bad):
            values = self.values if values is None else values
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            at = f"[{', '.join(map(str, index))}]" if index else ""
            self.call.fail(f"{name or self.name}{at} is {values[index]}, but {rule}.")

    def _lengths(self) -> np.ndarray:
        values, size = self.values, self._size
        # A symbolic size is known only in the program.
        static = isinstance(size, int)
        bad = (values < 0) | (values > size) if static else values < 0
        remedy = "clip or correct it"
        if not values.ndim and len(self.x_shape) > 1:
            remedy += ", or give one length for each row"
        self._raise_at(bad, f"must lie between 0 and {self._limit}; {remedy}")
        if self.layout.kind == "packed" and static:
            sums = np.asarray(values.astype(np.int64).sum(-1))
            remedy = "correct them (for one length a row use reverse_sequence)"
            if not self.call.reverses:
                remedy = "give lengths with sum(lengths) <= len(x)"
            self._raise_at(
                sums > size,
                f"must not pass {self._limit}; {remedy}",
                "lengths.sum(-1)",
                sums,
            )
        return values

    def _offsets(self) -> np.ndarray:
        values, size = self.values, self._size
        bad = np.zeros(values.shape, bool)
        bad[..., 0] = values[..., 0] != 0
        self._raise_at(bad, "the first offset must be 0")
        bad[..., 0], bad[..., 1:] = False, values[..., 1:] < values[..., :-1]
        self._raise_at(bad, "must not be less than the offset before it; correct it")
        if isinstance(size, int):
            rule = (
                f"must not pass {self._limit}; correct it, or name the axis with axis"
            )
            self._raise_at(values > size, rule)
        return np.diff(values)

    def _refuse_equal_blocks(self) -> None:
        if self.call.devices > 1:
            self.call.fail(
                f"{self.name} is on the host, the same on all {self.call.devices} "
                "devices of axis_name, which hold different blocks of it; pass it into "
                "shard_map with in_specs like those of x."
            )

    def _ids(self) -> tuple[np.ndarray, Layout]:
        self._refuse_equal_blocks()
        # Ids that differ only past 32 bits would become equal on a device: number the
        # runs instead, from 1.
        values, layout = self.values, self.layout
        starts = np.ones(values.shape, bool)
        starts[..., 1:] = values[..., 1:] != values[..., :-1]
        runs = np.cumsum(starts, -1)
        if layout.padding_id is not None:
            runs = np.where(values == layout.padding_id, 0, runs)
            layout = layout._replace(padding_id=0)
        return _as_positions(runs, self._size), layout


def _as_positions(values: np.ndarray, size: Any) -> np.ndarray:
    """Casts checked host values to the dtype of positions, saturating."""
    dtype = position_dtype(size)
    if values.dtype.itemsize == 8:
        values = np.asarray(np.minimum(values, np.iinfo(dtype).max))  # May be an int.
    return values.astype(dtype, copy=False)

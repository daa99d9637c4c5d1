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
        layout, devices = self.layout, self.call.devices
        if not layout.per_step:
            return _as_positions(self._lengths(), self._size), layout
        if devices > 1:
            what = f"{self.name} is on the host, the same on {devices} devices"
            remedy = "pass it into shard_map in blocks, with in_specs like those of x"
            self.call.fail(f"{what}; {remedy}.")
        return self._ids() if layout.kind == "ids" else (self.values, layout)

    @property
    def _size(self) -> Any:
        """The global size of the segment axis."""
        return self.x_shape[self.layout.axis] * self.call.devices

    def _check(self, name: str, values: np.ndarray, remedy: str) -> None:
        """Raises for the first value that is negative or passes the size."""
        size, devices = self._size, self.call.devices
        # A symbolic size is known only in the program.
        bad = (values < 0) | (values > (size if isinstance(size, int) else np.inf))
        if np.any(bad):
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            at = f"[{', '.join(map(str, index))}]" if index else ""
            over = f" over {devices} devices" * (devices > 1)
            limit = f"{size}, the size of axis {self.layout.axis} of {self.call.x_name}"
            what = f"{name}{at} is {values[index]}, but must lie between 0 and {limit}"
            self.call.fail(f"{what}{over}; {remedy}.")

    def _lengths(self) -> np.ndarray:
        """Returns the lengths, of offsets the differences."""
        name, values, packed = self.name, self.values, self.layout.kind == "packed"
        remedy = "clip or correct it"
        if name == "cu_seqlens":
            if np.any(first := values[..., 0]):
                self.call.fail(f"cu_seqlens[..., 0] is {first}, but must be 0.")
            name, values = "np.diff(cu_seqlens)", np.diff(values.astype(np.int64))
            remedy = "correct it, or name the axis with axis"
        elif packed and self.call.reverses:
            remedy = "correct it (for one length a row use reverse_sequence)"
        elif packed:
            remedy = "give lengths with sum(lengths) <= len(x), or swap x and lengths"
        elif values.ndim == 0 and len(self.x_shape) > 1:
            remedy += ", or give one length for each row"
        self._check(name, values, remedy)
        if packed:
            sums = np.asarray(values.astype(np.int64).sum(-1))
            self._check(f"{name}.sum(-1)", sums, remedy)
        return values

    def _ids(self) -> tuple[np.ndarray, Layout]:
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
    return np.asarray(np.minimum(values, np.int64(np.iinfo(dtype).max)), dtype)

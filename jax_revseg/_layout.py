"""How an array of segments describes the segments of `x`: one frozen value."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["padded", "packed", "ids", "mask"]


class Layout(NamedTuple):
    """The static parameter `layout` of `reverse_segments_p`.

    Attributes:
        kind: What `segments` holds for each row: one length ("padded"), `(K,)` lengths
            of segments laid end to end ("packed"), or `(T,)` ids ("ids"). Scans also
            have `(T,)` booleans ("mask"), which never reach the primitive.
        axis: The segment axis of `x`, counted from 0.
        batch_axes: Entry `i` names the axis of `x` that goes with axis `i` of
            `segments`. The entries are unsorted on purpose: `vmap` inserts the mapped
            axis as one more entry, so no axis of `x` ever moves.
        padding_id: The id whose runs are padding; None if there is none.
    """

    kind: Kind
    axis: int
    batch_axes: tuple[int, ...]
    padding_id: int | None = None

    def mapped(self, x_dim: int, segments_dim: int | None) -> Layout:
        """Returns the layout after `vmap` adds a dimension to `x`, or to both."""
        batch_axes = [a + (a >= x_dim) for a in self.batch_axes]
        if segments_dim is not None:
            batch_axes.insert(segments_dim, x_dim)
        axis = self.axis + (self.axis >= x_dim)
        return self._replace(axis=axis, batch_axes=tuple(batch_axes))

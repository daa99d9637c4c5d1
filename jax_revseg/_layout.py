"""How an array of segments describes the segments of `x`: one frozen value."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax

Kind = Literal["padded", "packed", "ids", "starts", "mask"]


class Layout(NamedTuple):
    """The static parameter `layout` of `reverse_segments_p`.

    Attributes:
        kind: What `segments` holds for each row: one length ("padded"), `(K,)` lengths
            of segments laid end to end ("packed"), `(T,)` ids ("ids"), or `(T,)`
            booleans that are true where a segment starts ("starts"). A mask of valid
            steps ("mask") never reaches the primitive.
        axis: The segment axis of `x`, counted from 0.
        batch_axes: Entry `i` names the axis of `x` that goes with axis `i` of
            `segments`. The entries are unsorted on purpose: `vmap` inserts the mapped
            axis as one more entry, so no axis of `x` ever moves.
        padding_id: The id whose runs are padding; None if there is none.
        function: The public function that was called, for the messages of checkify.
    """

    kind: Kind
    axis: int
    batch_axes: tuple[int, ...]
    padding_id: int | None = None
    function: str = "reverse_segments"

    @property
    def per_step(self) -> bool:
        """Whether `segments` has an entry for each position."""
        return self.kind in ("ids", "starts", "mask")

    @property
    def time_axis(self) -> int:
        """The segment axis in an array that lies like `x`, without its features."""
        return sum(a < self.axis for a in self.batch_axes)

    def sizes(self, xs: Any) -> tuple[tuple[Any, ...], Any]:
        """Returns the sizes of the batch axes of arrays, and of their segment axis."""
        shape = jax.tree.leaves(xs)[0].shape
        return tuple(shape[a] for a in self.batch_axes), shape[self.axis]

    def mapped(self, x_dim: int, segments_dim: int | None) -> Layout:
        """Returns the layout after `vmap` adds a dimension to `x`, or to both."""
        batch_axes = [a + (a >= x_dim) for a in self.batch_axes]
        if segments_dim is not None:
            batch_axes.insert(segments_dim, x_dim)
        axis = self.axis + (self.axis >= x_dim)
        return self._replace(axis=axis, batch_axes=tuple(batch_axes))

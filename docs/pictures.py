"""Draws the layouts, before and after, by calling the functions on letters.

`python docs/pictures.py FOLDER` writes one SVG for each; the site's build does so too.
Each cell has a colour of its own and dark text; what stands outside the cells is a grey
that one can read on a white page and on a dark one.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_revseg import reverse_segment_order, reverse_segments, reverse_sequence

CELL, GAP = 32, 56
COLORS = ["#56b4e9", "#e69f00", "#2fb28b", "#d98cb8", "#f0e442"]
GREY = "#808080"


class Picture(NamedTuple):
    function: Callable[[Any], Any]
    letters: list[str]  # One string a row; "." is padding.
    segments: list[str]  # The number of the segment at each position.
    ids: np.ndarray | None = None  # What the user gives for each position.


IDS = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 2, 2, 3, 3]])
MASK = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])

PICTURES = {
    "padded": Picture(
        lambda x: reverse_sequence(x, [3, 5]),
        ["abc..", "defgh"],
        ["000..", "11111"],
    ),
    "time-major": Picture(
        lambda x: reverse_sequence(x, [3, 5], axis=0),
        ["ad", "be", "cf", ".g", ".h"],
        ["01", "01", "01", ".1", ".1"],
    ),
    "packed": Picture(
        lambda x: reverse_segments(x, [[3, 2, 0], [4, 2, 2]]),
        ["abcde...", "fghijklm"],
        ["00011...", "22223344"],
    ),
    "ids": Picture(
        lambda x: reverse_segments(x, segment_ids=IDS, padding_id=0),
        ["abcde...", "fghijklm"],
        ["00011...", "22223344"],
        IDS,
    ),
    "cu-seqlens": Picture(  # An unbatched axis, drawn as one row.
        lambda x: reverse_segments(x[0], cu_seqlens=[0, 3, 5, 9])[None],
        ["abcdefghi."],
        ["000112222."],
    ),
    "left-padded": Picture(
        lambda x: reverse_segments(x, segment_ids=MASK, padding_id=0),
        ["...ab", ".cdef"],
        ["...00", ".1111"],
        MASK,
    ),
    "order": Picture(
        lambda x: reverse_segment_order(x[0], [2, 4])[0][None],
        ["abcdef"],
        ["001111"],
    ),
}


def _grid(
    letters: np.ndarray, segments: np.ndarray, left: int, top: int, ids: Any
) -> list[str]:
    cells = []
    for (row, column), letter in np.ndenumerate(letters):
        x, y = left + column * CELL, top + row * CELL
        if letter == ".":
            text, paint = GREY, f'fill="none" stroke="{GREY}" stroke-dasharray="3 3"'
        else:
            text, paint = "#111111", f'fill="{COLORS[int(segments[row, column])]}"'
        cells.append(
            f'<rect x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" '
            f'rx="4" {paint}/>'
            f'<text x="{x + CELL / 2}" y="{y + CELL / 2}" fill="{text}">{letter}</text>'
        )
        if ids is not None:
            cells.append(
                f'<text x="{x + CELL - 8}" y="{y + CELL - 9}" fill="{text}" '
                f'font-size="10">{ids[row, column]}</text>'
            )
    return cells


def svg(picture: Picture) -> str:
    letters, segments = (
        np.array([list(row) for row in rows])
        for rows in (picture.letters, picture.segments)
    )

    def move(symbols: np.ndarray) -> np.ndarray:
        codes = symbols.view(np.uint32).reshape(symbols.shape)
        return np.asarray(picture.function(codes)).astype(np.uint32).view("U1")

    rows, columns = letters.shape
    width, height = columns * CELL, rows * CELL
    if columns > 5:  # One above the other, or a phone would make it too small.
        left, top = 0, height + GAP
        arrow = f"M{width / 2} {height + 14}v28m-7 -8l7 8l7 -8"
    else:
        left, top = width + GAP, 0
        arrow = f"M{width + 14} {height / 2}h28m-8 -7l8 7l-8 7"
    size = (width + left, height + top)
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" '
            'height="{}" font-family="ui-monospace, monospace" font-size="17" '
            'text-anchor="middle" dominant-baseline="central">'.format(*size, *size),
            *_grid(letters, segments, 0, 0, picture.ids),
            f'<path d="{arrow}" fill="none" stroke="{GREY}" stroke-width="2.5"/>',
            *_grid(move(letters), move(segments), left, top, picture.ids),
            "</svg>\n",
        ]
    )


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        (folder / f"{name}.svg").write_text(svg(picture))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

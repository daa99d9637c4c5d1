"""Draw the pictures of the README and of the pages into docs/images.

The library itself moves the letters in the pictures of the layouts. The demo's picture
shows docs/images/demo.json, the results of 20 seeds, and the picture of chunks shows
docs/images/chunk.json:

    make demo ARGS="--seeds 20 --output docs/images"
    python examples/longest_row.py --output docs/images

The text of an SVG is the same on every machine: a test draws all again and compares.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_revseg import reverse_segment_order, reverse_segments, reverse_sequence

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from _report import page, picture as demo  # noqa: E402
from longest_row import picture as chunk  # noqa: E402

IMAGES = HERE / "images"
CELL, GAP, MARGIN = 32, 56, 10
COLORS = ["#56b4e9", "#e69f00", "#2fb28b", "#d98cb8", "#f0e442"]
GREY, INK = "#666666", "#111111"
STYLE = (
    'font-family="ui-monospace, monospace" font-size="17" text-anchor="middle" '
    'dominant-baseline="central"'
)


class Picture(NamedTuple):
    function: Callable[[Any], Any]
    letters: list[str]  # One string a row; "." is padding.
    segments: list[str]  # The number of the segment at each position.
    ids: np.ndarray | None = None  # What the user gives for each position.


IDS = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 2, 2, 3, 3]])
MASK = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])

LAYOUTS = {
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
    "time-major-ids": Picture(
        lambda x: reverse_segments(x, segment_ids=IDS.T, padding_id=0, axis=0),
        ["af", "bg", "ch", "di", "ej", ".k", ".l", ".m"],
        ["02", "02", "02", "12", "13", ".3", ".4", ".4"],
        IDS.T,
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


def arrays(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """The letters and the segment numbers, one character in each cell."""
    letters, segments = picture.letters, picture.segments
    return np.array([*map(list, letters)]), np.array([*map(list, segments)])


def grid(
    letters: np.ndarray, segments: np.ndarray, left: float, top: float, ids: Any
) -> list[str]:
    """The cells of a batch: a colour for each segment, dashes for padding."""
    cells = []
    for (row, column), letter in np.ndenumerate(letters):
        x, y = left + column * CELL, top + row * CELL
        center = x + CELL / 2 - (0 if ids is None else 3)
        if letter == ".":
            ink, paint = GREY, f'fill="none" stroke="{GREY}" stroke-dasharray="3 3"'
        else:
            ink, paint = INK, f'fill="{COLORS[int(segments[row, column])]}"'
        cells.append(
            f'<rect x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" '
            f'rx="4" {paint}/>'
            f'<text x="{center}" y="{y + CELL / 2}" fill="{ink}">{letter}</text>'
        )
        if ids is not None:
            cells.append(
                f'<text x="{x + CELL - 8}" y="{y + CELL - 9}" fill="{ink}" '
                f'font-size="12">{ids[row, column]}</text>'
            )
    return cells


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{GREY}" stroke-width="2.5"/>'


def move(
    function: Callable[[Any], Any], letters: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Call the function on the code points of the letters and of the segments."""

    def moved(symbols: np.ndarray) -> np.ndarray:
        codes = symbols.view(np.uint32).reshape(symbols.shape)
        return np.asarray(function(codes)).astype(np.uint32).view("U1")

    return moved(letters), moved(segments)


def layout(picture: Picture) -> str:
    """A batch before and after the function of the picture."""
    letters, segments = arrays(picture)
    rows, columns = letters.shape
    width, height = columns * CELL, rows * CELL
    if columns > 5:  # Below each other: side by side is too small on a phone.
        left, top = 0, height + GAP
        path = f"M{MARGIN + width / 2} {MARGIN + height + 14}v28m-7 -8l7 8l7 -8"
    else:
        left, top = width + GAP, 0
        path = f"M{MARGIN + width + 14} {MARGIN + height / 2}h28m-8 -7l8 7l-8 7"
    after = move(picture.function, letters, segments)
    parts = [
        *grid(letters, segments, MARGIN, MARGIN, picture.ids),
        arrow(path),
        *grid(*after, MARGIN + left, MARGIN + top, picture.ids),
    ]
    return page(width + left + 2 * MARGIN, height + top + 2 * MARGIN, parts, STYLE)


def flip() -> str:
    """What `jnp.flip` and `reverse_sequence` make of the same batch."""
    functions = {
        "jnp.flip": lambda x: np.flip(x, 1),
        "reverse_sequence": lambda x: reverse_sequence(x, [3, 5]),
    }
    letters, segments = arrays(LAYOUTS["padded"])
    height, width = (CELL * size for size in letters.shape)
    label, step = 24, height + 42  # From one result to the next.
    left, top = MARGIN + width + GAP, MARGIN + label
    middle = top + step / 2

    def title(x: float, y: float, words: str) -> str:
        style = f'fill="{INK}" font-size="15"'
        return f'<text x="{x + width / 2}" y="{y - label / 2}" {style}>{words}</text>'

    parts = [title(MARGIN, middle, "batch")]
    parts += grid(letters, segments, MARGIN, middle, None)
    for n, (name, function) in enumerate(functions.items()):
        y = top + n * step
        after = move(function, letters, segments)
        start = f"M{MARGIN + width + 10} {middle + height / 2}h16"
        parts.append(arrow(f"{start}V{y + height / 2}h18m-7 -7l7 7l-7 7"))
        parts += [title(left, y, name), *grid(*after, left, y, None)]
    return page(left + width + MARGIN, top + step + height + MARGIN, parts, STYLE)


def draw() -> dict[str, str]:
    """The file name and the text of each picture."""
    drawn = {"flip.svg": flip()}
    for name, picture in (("demo", demo), ("chunk", chunk)):
        results = json.loads((IMAGES / f"{name}.json").read_text())
        drawn[f"{name}.svg"] = picture(results)
    layouts = {f"{name}.svg": layout(picture) for name, picture in LAYOUTS.items()}
    return drawn | layouts


if __name__ == "__main__":
    for name, svg in draw().items():
        (IMAGES / name).write_text(svg)

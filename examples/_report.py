"""The table and the picture of `japanese_vowels.py`.

The picture is an SVG whose text depends on the results alone, so a test can compare it.
"""

import json
from math import log

import numpy as np

from jax_revseg import reverse_sequence

LEFT, RIGHT, TOP, BOTTOM = 40, 466, 44, 236  # The curves' frame.
INK, PADDING = "#222222", "#e3e3e3"
COLORS = ["#6b6b6b", "#1f6fb2", "#c24e00"]  # One a model; dark enough for text.
HALO = ' font-weight="bold" paint-order="stroke" stroke="#ffffff" stroke-width="4"'
SHADES = ["#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e"]


def report(folder, results, explained):
    """Print the table; write the results as JSON and the picture as SVG."""
    accuracy, paddings = results["accuracy"], results["padded_to"]
    seeds, updates = len(accuracy["forward only"][0]), results["updates"]
    print(f"\n{seeds} seeds, {updates} updates, training at {paddings[0]} steps")
    print(f"{'padded to':18}the length of every row of the test batch, with padding")
    for name, explanation in explained.items():
        print(f"{name:18}{explanation}")
    print(
        f"{'each figure':18}% of valid steps correct: mean of the seeds (their range)"
    )
    print("\npadded to" + "".join(f"{name:>21}" for name in accuracy))
    for padded_to, *row in zip(paddings, *accuracy.values(), strict=True):
        cells = (f"{np.mean(r):.1f} ({min(r):.1f}-{max(r):.1f})" for r in row)
        print(f"{padded_to:9}" + "".join(f"{cell:>21}" for cell in cells))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(results) + "\n")
    (folder / "demo.svg").write_text(picture(results))
    print(f"\nThe same as curves, and a batch before and after: {folder}/demo.svg")


def picture(results):
    """The curves above a batch before and after each reversal."""
    return page(480, 500, curves(results) + batch(results["lengths"], top=318))


def page(width, height, parts, style='font-family="system-ui, sans-serif"'):
    """An SVG on a white card, so that dark text is legible on a dark page too."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    card = f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, card, *parts, "</svg>\n"])


def text(x, y, words, size=15, color=INK, anchor="start", extra=""):
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}"{extra}>{words}</text>'
    )


def line(points, color, width, opacity=1.0):
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" '
        f'stroke-width="{width}" stroke-opacity="{opacity:g}"/>'
    )


def axes(paddings, lowest):
    """The grid and its labels; functions from steps to x and from percent to y."""
    tick = next(tick for tick in (2, 5, 10, 20) if 100 - lowest < 6.5 * tick)
    floor = lowest // tick * tick

    def x(steps):
        return LEFT + (RIGHT - LEFT) * log(
            steps / paddings[0], paddings[-1] / paddings[0]
        )

    def y(percent):
        return TOP + (BOTTOM - TOP) * (100 - percent) / (100 - floor)

    parts = []
    for percent in np.arange(floor, 101, tick):
        parts.append(line([(LEFT, y(percent)), (RIGHT, y(percent))], "#dddddd", 1))
        parts.append(text(LEFT - 6, y(percent) + 5, f"{percent:g}", 14, anchor="end"))
    for steps in paddings:
        if steps not in (32, 36, 50):  # Their labels would touch.
            anchor = "end" if steps == paddings[-1] else "middle"
            parts.append(text(x(steps), BOTTOM + 20, steps, 14, anchor=anchor))
    words = f"steps that the test batch is padded to (training: {paddings[0]})"
    return [*parts, text(RIGHT, BOTTOM + 42, words, anchor="end")], x, y


def curves(results):
    """A thick line for the mean of each model's seeds, a thin line for each seed."""
    paddings = results["padded_to"]
    accuracy = {name: np.array(rows) for name, rows in results["accuracy"].items()}
    parts, x, y = axes(paddings, min(rows.min() for rows in accuracy.values()))

    def curve(column, *style):
        return line(zip(map(x, paddings), map(y, column), strict=True), *style)

    colors = dict(zip(accuracy, COLORS, strict=True))
    for name, rows in accuracy.items():
        parts += [curve(seed, colors[name], 1, 0.35) for seed in rows.T]
    for name, rows in accuracy.items():
        parts.append(curve(rows.mean(1), colors[name], 4))
    ends = {name: y(rows[-1].mean()) - 8 for name, rows in accuracy.items()}
    height = 0
    for name in sorted(ends, key=ends.__getitem__):
        height = max(height + 18, ends[name])  # Labels do not overlap.
        parts.append(text(RIGHT, height, name, 15, colors[name], "end", HALO))
    seeds = len(accuracy["forward only"][0])
    words = f"% of valid steps correct (thick: mean of {seeds} seeds)"
    return [*parts, text(14, 24, words, 16)]


def batch(lengths, top):
    """The steps of a batch, light to dark: as it is, flipped, and reversed."""
    longest, lengths = max(lengths), np.array(lengths)
    step = np.arange(1, longest + 1)
    shade = np.ceil(step / lengths[:, None] * len(SHADES)).astype(int)
    rows = np.where(step <= lengths[:, None], shade, 0)  # 0 is padding.
    panels = {
        "batch": rows,
        "naive flip": rows[:, ::-1],
        "reverse_sequence": np.asarray(reverse_sequence(rows, lengths)),
    }
    parts = [text(14, top, "A batch, and what the second GRU reads", 16)]
    top += 14
    for left, (name, panel) in zip((14, 168, 322), panels.items(), strict=True):
        parts.append(text(left, top + 12, name))
        parts += cells(panel, left, top + 20, 5, 8)
    left, top = 14, top + 20 + 9 * len(rows) + 22
    parts.append(text(left, top, "first step", 14))
    parts += cells(np.arange(1, 8)[None], left + 74, top - 11, 14, 12)
    parts.append(text(left + 180, top, "last step", 14))
    parts += cells(np.zeros((1, 1), int), left + 308, top - 11, 14, 12)
    parts.append(text(left + 330, top, "padding", 14))
    return parts


def cells(shades, left, top, width, height):
    """One path for each shade, with a rectangle for each cell."""
    parts = []
    for shade, color in enumerate([PADDING, *SHADES]):
        path = "".join(
            f"M{left + width * t} {top + (height + 1) * n}h{width}v{height}h-{width}z"
            for n, t in np.argwhere(shades == shade)
        )
        if path:
            parts.append(f'<path d="{path}" fill="{color}"/>')
    return parts

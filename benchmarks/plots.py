"""Plots of one machine's results, on a clear ground, for light pages and dark ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.report import OURS, find, rows  # noqa: E402

GREY = "#808080"  # Has a contrast of 4 to white and 5 to black.
OURS_COLOR = "#d55e00"
COLORS = [
    "#0a8f6a",
    "#2a87c8",
    "#b0579a",
    "#a58a00",
    "#7f6fd6",
    "#3f9fa8",
    "#9a6b4f",
    "#c85a7c",
]
STYLE: Any = {
    **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor")},
    **{key: GREY for key in ("xtick.color", "ytick.color", "grid.color")},
    **{"grid.alpha": 0.3, "axes.grid": True, "legend.frameon": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "font.size": 10},
    **{"savefig.transparent": True, "savefig.dpi": 150, "savefig.bbox": "tight"},
}


def cases(data: dict[str, Any]) -> Any:
    """A dot for each contender: its time over that of the copy, by kind of output."""
    found = {
        name if row["noise"]["quiet"] else f"{name} (noisy)": row
        for name, row in rows(data, "case").items()
    }
    figure, panels = plt.subplots(
        1, 2, sharey=True, figsize=(11, 1 + 0.42 * len(found)), layout="constrained"
    )
    names = dict.fromkeys(
        t["name"] for row in found.values() for t in row["times"] if "ours" in t["to"]
    )
    colors = dict(zip((n for n in names if n != OURS), COLORS, strict=False))
    for panel, regimes in zip(panels, (("reused",), ("fresh", "pooled")), strict=True):
        for name in [*colors, "x + 1", OURS]:
            points = [
                (t["to"]["copy"]["ratio"], y)
                for y, row in enumerate(found.values())
                for regime in regimes
                if (t := find(row, name, regime))
            ]
            mark = {OURS: "D", "x + 1": "|"}.get(name, "o")
            color = {OURS: OURS_COLOR, "x + 1": GREY}.get(name) or colors[name]
            x, y = zip(*points, strict=True) if points else ((), ())
            big = name in (OURS, "x + 1")
            panel.scatter(
                x, y, marker=mark, color=color, label=name, s=70 if big else 32
            )
        panel.axvline(1, color=GREY, linestyle="--", linewidth=1)
        panel.set_xscale("log")
        ticks = [0.5, 1, 2, 5, 10, 20, 50]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(f"time over that of a copy, output {' or '.join(regimes)}")
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    handles = {}
    for panel in panels:
        handles |= {h.get_label(): h for h in panel.collections if len(h.get_offsets())}
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=5)
    return figure


CURVES = (
    ("T", "T of (16, T, 64)", ("T",)),
    ("N", "N of (N, 128, 64)", ("N",)),
    ("D", "D of (32, 128, D)", ("D",)),
    ("K", "K segments of (1, 64 K, 64)", ("K", "K by ids")),
    ("K", "K segments of (1, 262144, 64)", ("K at 64 MB", "K by ids at 64 MB")),
)


def growth(data: dict[str, Any]) -> Any:
    """Time over size, both on logarithmic axes, up to 1 GB."""
    # On axes of so many powers of ten even a noisy point tells something.
    found = [
        row for row in rows(data, "curve").values() if row["noise"]["resolution"] < 0.3
    ]
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    lines = (
        ("x + 1", "x + 1", "forward", dict(color=GREY, linestyle="-", marker="|")),
        ("copy", "copy", "forward", dict(color=GREY, linestyle="--")),
        (OURS, OURS, "forward", dict(color=OURS_COLOR, marker="D", markersize=4)),
        ("its VJP", OURS, "vjp", dict(color=COLORS[2], linestyle=":", linewidth=2.5)),
    )
    for panel, (_, title, curves) in zip(panels.flat, CURVES, strict=False):
        for curve in curves:
            points = sorted(
                (row for row in found if row["curve"] == curve),
                key=lambda row: row["value"],
            )
            by_ids = "by ids" in curve
            for label, name, direction, style in lines:
                if by_ids and name != OURS:
                    continue  # The same as beside the lengths.
                if by_ids:
                    color = COLORS[1] if direction == "forward" else COLORS[3]
                    label, style = f"{label} by ids", style | dict(color=color)
                times = [find(row, name, "reused", direction) for row in points]
                xy = [
                    (r["value"], 1e3 * t["seconds"])
                    for r, t in zip(points, times, strict=True)
                    if t
                ]
                if xy:
                    panel.plot(*zip(*xy, strict=True), label=label, **style)
        panel.set(xscale="log", yscale="log", xlabel=title, ylabel="ms")
    panels.flat[-1].axis("off")
    handles, labels = panels.flat[3].get_legend_handles_labels()
    panels.flat[-1].legend(handles, labels, loc="center")
    return figure


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    paths = []
    with plt.rc_context(STYLE):
        for make in (cases, growth):
            path = folder / f"performance-{data['slug']}-{make.__name__}.png"
            figure = make(data)
            figure.savefig(path, metadata={"Software": None})
            plt.close(figure)
            paths.append(path)
    return paths

"""Puts the committed results into docs/: `python -m benchmarks.report`.

The tables of docs/performance.md stand between comments that name them, and are made
from benchmarks/results/ alone; so are the plots beside it. The last line that it prints
is a summary for the README.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.results import FOLDER, source

DOCS = FOLDER.parent.parent / "docs"
PAGE = DOCS / "performance.md"
OURS = "jax_revseg"
Data = dict[str, Any]


def load() -> list[Data]:
    """Every machine's results, with the name of its file."""
    paths = sorted(FOLDER.glob("*.json"))
    return [json.loads(path.read_text()) | {"slug": path.stem} for path in paths]


# ---- reading a row


def rows(data: Data, kind: str) -> dict[str, Data]:
    """The rows of a kind: "case", "curve", "forms", "dispatch" or "rnn"."""

    def of(name: str, row: Data) -> str:
        if "curve" in row:
            return "curve"
        if name.startswith("forms-"):
            return "forms"
        return "case" if "layout" in row else name.split("-")[0]

    return {n: row for n, row in data["rows"].items() if of(n, row) == kind}


def _quiet(row: Data) -> bool:
    return row["noise"]["quiet"]


def find(row: Data, name: str, regime: str, direction: str = "forward") -> Data | None:
    for t in row["times"]:
        if (t["name"], t["regime"], t["direction"]) == (name, regime, direction):
            return t
    return None


def _name(name: str, row: Data) -> str:
    return f"`{name}`" if _quiet(row) else f"`{name}` (noisy)"


def _to(time: Data | None, label: str) -> str:
    found = (time or {}).get("to", {}).get(label)
    return f"{found['ratio']:.2f} ± {found['error']:.2f}" if found else ""


def _ms(time: Data | None) -> str:
    return f"{1e3 * time['seconds']:.3g}" if time else ""


def _bytes(n: int) -> str:
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def _markdown(head: list[str], body: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the parts of the page


def machine(data: Data) -> str:
    """What the figures were measured with, and which of them tell nothing."""
    parts = []
    for at, run in data["runs"].items():
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        count = sum(row["run"] == at for row in data["rows"].values())
        parts.append(
            f"- {at[:10]}, {count} rows: Python {run['python']}, {versions}; load "
            f"before the run {run['load_before']}; source `{run['source']}`."
        )
    noisy = [name for name, row in data["rows"].items() if not _quiet(row)]
    if noisy:
        parts.append(
            f"- Noisy: {len(noisy)} of {len(data['rows'])} rows; "
            f"{sum('curve' in data['rows'][name] for name in noisy)} of these are "
            "points of the curves."
        )
    return "\n".join(parts)


def cases(data: Data) -> str:
    """Where a case stands beside the limits."""
    body = []
    for name, row in rows(data, "case").items():
        reused, fresh = (find(row, OURS, regime) for regime in ("reused", "fresh"))
        ratios = [
            *(_to(reused, label) for label in ("x + 1", "copy")),
            _to(find(row, OURS, "reused", "vjp"), "forward"),
            _to(fresh, "x + 1"),
        ]
        temporary = row["temporary_bytes"].get(OURS)
        body.append(
            [
                _name(name, row),
                _bytes(row["bytes"]),
                _ms(reused),
                *ratios,
                _bytes(temporary["forward"]) if temporary else "",
            ]
        )
    head = ["case", "bytes", "ms", "to `x + 1`", "to a copy", "VJP to forward"]
    return _markdown([*head, "fresh, to fresh `x + 1`", "temporary"], body)


def peers(data: Data) -> str:
    """How many times our time each peer takes, where it does best beside us."""
    found: dict[str, dict[str, Data]] = {}
    for name, row in rows(data, "case").items():
        for t in row["times"]:
            if "ours" not in t["to"] or t["name"] == OURS:
                continue
            column = t["name"] + (", VJP" if t["direction"] == "vjp" else "")
            columns = {column: t["to"]["ours"]}
            if "fresh" in t["to"]:
                columns[column + ", to ours fresh"] = t["to"]["fresh"]
            for column, ratio in columns.items():
                best = found.setdefault(column, {})
                ratios = [r for r in (best.get(name), ratio) if r]
                best[name] = min(ratios, key=lambda r: r["ratio"])
    body = [
        [_name(name, row), *(_cell(by_case.get(name)) for by_case in found.values())]
        for name, row in rows(data, "case").items()
    ]
    if not body:
        return "Not run."
    return _markdown(["case", *found], body)


def _cell(ratio: Data | None) -> str:
    if not ratio:
        return ""
    text = f"{ratio['ratio']:.2f} ± {ratio['error']:.2f}"
    # Only what the error leaves no doubt about is called slower.
    return f"**{text}**" if ratio["ratio"] + ratio["error"] < 1 else text


def dispatch(data: Data) -> str:
    row = rows(data, "dispatch").get("dispatch")
    if not row:
        return "Not run."
    body = [
        [f"{t['name']}, {t['regime']}", f"{1e6 * t['seconds']:.1f}", _to(t, "jnp.flip")]
        for t in row["times"]
    ]
    fresh = row["fresh output"]
    calls = [
        [f"{name}", f"{c['stablehlo_bytes'] / 1e3:.1f} kB", _ms(c) + " ms"]
        for name, c in row["40 calls"].items()
    ]
    return "\n\n".join(
        [
            _markdown(["a call on (4, 16, 8)", "us", "to `jnp.flip`"], body),
            _markdown(["40 calls in one function", "StableHLO", "compile"], calls),
            f"`import jax_revseg` adds {_ms(row['import'])} ms to `import jax`.",
            "A fresh output of 64 MB makes `x + 1` take "
            f"{fresh['default']} times as long as a reused one; with huge pages, "
            f"{fresh['huge pages']} times.",
        ]
    )


def forms(data: Data) -> str:
    """Other forms of the lowering, over `x + 1`."""
    body = []
    for name, row in rows(data, "forms").items():
        times = [t for t in row["times"] if "ours" in t["to"]]
        found = [
            f"{t['name']} {_to(t, 'x + 1')}" for t in times if t["direction"] != "vjp"
        ]
        body.append([_name(name.removeprefix("forms-"), row), "; ".join(found)])
    if not body:
        return "Not run."
    return _markdown(["case", "time over that of `x + 1`"], body).replace("--:", "---")


def rnn(data: Data) -> str:
    """A step of a bidirectional network, in several ways."""
    body = [
        [
            _name(name.removeprefix("rnn-"), row),
            *(t["name"], t["direction"], _ms(t)),
            *(_to(t, to) for to in ("ours", "two scans")),
        ]
        for name, row in rows(data, "rnn").items()
        for t in row["times"]
        if not t["name"].endswith(", again")
    ]
    if not body:
        return "Not run."
    head = ["N, T, D, H", "way", "direction", "ms", "to ours", "to two scans"]
    return _markdown(head, body)


def pictures(data: Data) -> str:
    device = data["machine"]["device"]
    return "\n\n".join(
        f"![{alt}, on {device}](performance-{data['slug']}-{kind}.png)"
        for kind, alt in (
            ("cases", "The time of each contender over that of a copy, case by case"),
            (
                "growth",
                "The time of a reversal, of x + 1 and of a copy, as T, N, D, K "
                "and the segments at a fixed size grow",
            ),
        )
    )


def readme(data: Data) -> str:
    """One line with one figure, for the README."""
    row = rows(data, "case").get("padded-64x128x256")
    if not row:
        return ""
    ours = find(row, OURS, "reused")
    idiom = find(row, "take_along_axis", "reused")
    idiom_vjp = find(row, "take_along_axis", "reused", "vjp")
    return (
        f"A float32 (64, 128, 256) batch takes {_to(ours, 'x + 1')} times as long as "
        f"`x + 1`, which reads and writes as much; the `where` + `take_along_axis` "
        f"snippet takes {_to(idiom, 'ours')} times that, and its gradient "
        f"{_to(idiom_vjp, 'ours')} times ours ({data['machine']['device']}; "
        "[all figures](docs/performance.md))."
    )


PARTS: dict[str, Callable[[Data], str]] = {
    "machine": machine,
    "cases": cases,
    "peers": peers,
    "dispatch": dispatch,
    "forms": forms,
    "rnn": rnn,
    "pictures": pictures,
}


def render(page: str, all_data: list[Data]) -> str:
    """The page with each part between its comments made anew."""

    def part(match: re.Match[str]) -> str:
        make = PARTS[match[1]]
        made = [
            f"**{data['machine']['device']}**\n\n{make(data)}" for data in all_data
        ] or ["Not run."]
        return "\n\n".join([f"<!-- {match[1]} -->", *made, "<!-- end -->"])

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", part, page, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    all_data = load()
    for data in all_data:
        stale = {run["source"] for run in data["runs"].values()} - {source()}
        if stale:
            print(f"{data['slug']}: some rows are from other source, {stale}")
    PAGE.write_text(render(PAGE.read_text(), all_data))
    from benchmarks import plots  # Tests render the page without matplotlib.

    for data in all_data:
        for path in plots.draw(data, DOCS):
            print(path)
    print(*(readme(data) for data in all_data), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

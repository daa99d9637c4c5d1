"""The figures of docs/performance.md and of the README: `python -m benchmarks.report`.

The tables stand between comments that name them. All figures and pictures are made
from benchmarks/results/ alone.
"""

from __future__ import annotations

import json
import re

from benchmarks.recurrences import CHUNK, SCAN
from benchmarks.results import FOLDER
from benchmarks.reversals import COPY, OURS, SNIPPET
from benchmarks.timing import LIMIT, Row

DOCS = FOLDER.parent.parent / "docs"
PAGE, README = DOCS / "performance.md", DOCS.parent / "README.md"


def load() -> dict[str, Row]:
    """Every machine's results by the name of the file."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}


def quiet(data: Row, group: str) -> dict[str, Row]:
    """The rows of a group that are not too noisy, by their names without the group."""
    return {
        name.removeprefix(f"{group} "): row
        for name, row in data["rows"].items()
        if row["group"] == group and row["noise"] <= LIMIT
    }


def find(row: Row, name: str, output: str, direction: str) -> Row | None:
    for t in row["times"]:
        if (t["name"], t["output"], t["direction"]) == (name, output, direction):
            return t
    return None


def ratio(time: Row | None, base: str) -> str:
    found = time["to"].get(base) if time else None
    if not found:
        return ""
    if found["error"] > found["ratio"] / 4:
        return "noisy"
    return f"{found['ratio']:.2f} ± {found['error']:.2f}"


def ms(time: Row | None) -> str:
    return f"{1e3 * time['seconds']:.3g}" if time else ""


EMPTY = "Not measured."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return EMPTY
    rows = [head, ["---"] + ["--:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- the parts of the page


def machine(data: Row) -> str:
    counts: dict[str, int] = {}
    for row in data["rows"].values():
        versions = data["runs"][row["run"]]["versions"].items()
        run = f"{row['run'][:10]}: {', '.join(f'{k} {v}' for k, v in versions)}"
        counts[run] = counts.get(run, 0) + 1
    parts = [f"{count} rows of {run}." for run, count in counts.items()]
    if noisy := [k for k, row in data["rows"].items() if row["noise"] > LIMIT]:
        parts.append(f"Too noisy, and left out: {', '.join(noisy)}.")
    return " ".join(parts)


def limits(data: Row) -> str:
    head = ["case", "reused, ms", "to a copy", "gradient, to a copy"]
    head += ["new, ms", "to a new copy", "temporary kB"]
    lines = []
    for name, row in quiet(data, "reversal").items():
        times = [find(row, OURS, output, "forward") for output in ("reused", "new")]
        texts = [text for t in times for text in (ms(t), ratio(t, COPY))]
        backward = ratio(find(row, OURS, "reused", "gradient"), COPY)
        temporary = f"{row['temporary_bytes'] / 1e3:.1f}"
        lines.append([f"`{name}`", *texts[:2], backward, *texts[2:], temporary])
    return markdown(head, lines)


WAYS = {"forward": "", "gradient": ", gradient"}
PLAIN = [(name, "new", "forward") for name in (SNIPPET, "Flax", "PyTorch")]
for _name in ("TensorFlow", "TensorFlow XLA", "ONNX Runtime"):
    PLAIN.append((_name, "pooled", "forward"))
REUSED = [(name, "reused", way) for name in (SNIPPET, "Flax") for way in WAYS]
REUSED.append(("PyTorch", "reused", "forward"))


def peers(data: Row, columns: list[tuple[str, str, str]]) -> str:
    """Ratios to the same call of this library; in bold what is faster beyond doubt."""
    lines = []
    for name, row in quiet(data, "reversal").items():
        cells = []
        for column in columns:
            t = find(row, *column)
            r = t["to"][OURS] if t else None
            text = ratio(t, OURS)
            faster = r and text != "noisy" and r["ratio"] + r["error"] < 1
            cells.append(f"**{text}**" if faster else text)
        if any(cells):
            lines.append([f"`{name}`", *cells])
    return markdown(["case", *(name + WAYS[way] for name, _, way in columns)], lines)


def recurrence(data: Row, group: str) -> str:
    """The time of the first contender, and the ratio of each other one to it.

    Beside chunks stands the temporary memory of the gradient.
    """
    rows, memory = quiet(data, group), (SCAN, CHUNK) if group == "chunk" else ()
    names = list(dict.fromkeys(t["name"] for r in rows.values() for t in r["times"]))
    lines = []
    for name, row in rows.items():
        for way, title in WAYS.items():
            base, *others = (find(row, n, "new", way) for n in names)
            cells = [ms(base), *(ratio(t, names[0]) for t in others)]
            sizes = row.get("gradient_bytes", {}) if way == "gradient" else {}
            cells += [f"{sizes[n] / 1e6:.0f}" if n in sizes else "" for n in memory]
            lines.append([f"`{name}`{title}", *cells])
    head = ["", *(n + ", ms" * (n == names[0]) for n in names)]
    return markdown([*head, *(f"{n}, MB" for n in memory)], lines)


def calls(data: Row) -> str:
    if not (row := quiet(data, "calls").get("calls")):
        return EMPTY
    lines = []
    for t in row["times"]:
        base = "jnp.flip" + ", jitted" * ("jitted" in t["name"])
        lines.append([t["name"], f"{1e6 * t['seconds']:.1f}", ratio(t, base)])
    return markdown(["a call on (4, 16, 8)", "us", "to `jnp.flip`"], lines) + (
        f"\n\n`import jax_revseg` adds {1e3 * row['import_seconds']:.0f} ms to "
        "`import jax`."
    )


# ---- pictures


def svg(title: str, bars: list[tuple[str, Row]]) -> str:
    """Horizontal bars with their errors, and a line at 1; 400 wide, for a phone."""
    left, unit = 190, 150 / max([2.0, *(r["ratio"] + r["error"] for _, r in bars)])
    height = 46 + 24 * len(bars)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 {height}" '
        'width="400" font-family="sans-serif" font-size="13" fill="#111111">',
        '<rect width="400" height="100%" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{title}</text>',
    ]
    for i, (label, r) in enumerate(bars):
        y, end = 34 + 24 * i, left + unit * r["ratio"]
        low, high = (end + sign * unit * r["error"] for sign in (-1, 1))
        out += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="17" '
            'fill="#8fc1e8"/>',
            f'<path d="M{low:.1f} {y + 8.5}H{high:.1f}" stroke="#111111"/>',
            f'<text x="{high + 6:.1f}" y="{y + 13}">{r["ratio"]:.2f}</text>',
        ]
    x = f"{left + unit:.1f}"
    out.append(f'<path d="M{x} 28V{height - 8}" stroke="#c03a00" stroke-width="1.5"/>')
    return "\n".join([*out, "</svg>\n"])


def pictures(slug: str, data: Row) -> dict[str, tuple[str, str]]:
    """For each file: its title, and its text."""

    def bars(group: str, name: str, output: str, base: str) -> list[tuple[str, Row]]:
        found = []
        for label, row in quiet(data, group).items():
            t = find(row, name, output, "forward")
            if t and base in t["to"]:
                found.append((label, t["to"][base]))
        return found

    shown = {
        "A reversal; a copy takes 1": ("reversal", OURS, "reused", COPY),
        "scan_segments; lax.scan takes 1": ("scan", "scan_segments", "new", SCAN),
    }
    return {
        f"performance-{slug}-{what[0]}.svg": (title, svg(title, found))
        for title, what in shown.items()
        if (found := bars(*what))
    }


# ---- the pages


def readme(data: Row) -> str:
    """The paragraph on speed."""
    row = quiet(data, "reversal")["padded-64x128x256"]
    scan = quiet(data, "scan")["GRU 32x128x32x64"]
    ours = ratio(find(row, OURS, "reused", "forward"), COPY)
    ragged = ratio(find(scan, "scan_segments", "new", "forward"), SCAN)
    forward, backward = (
        t["to"][OURS]["ratio"]
        for way in WAYS
        if (t := find(row, SNIPPET, "reused", way))
    )
    alike = f"is as fast forward ({forward:.2f} times), but"
    if abs(forward - 1) > LIMIT:
        alike = f"takes {forward:.2f} times as long forward, and"
    return (
        f"A float32 batch of (64, 128, 256) takes {ours} times as long as a copy. The "
        f"`where` + `take_along_axis` snippet {alike} its gradient takes "
        f"{backward:.1f} times as long. A GRU in `scan_segments` takes {ragged} times "
        "as long as in `lax.scan`, which treats padding as data "
        f"({data['device']}; [all figures](docs/performance.md))."
    )


PARTS = ("machine", "limits", "plain", "reused", "scan", "chunk", "associative")
PARTS += ("bidirectional", "calls", "pictures")


def part(name: str, slug: str, data: Row) -> str:
    if name == "pictures":
        made = pictures(slug, data).items()
        return "\n\n".join(f"![{title}]({file})" for file, (title, _) in made)
    if name in ("plain", "reused"):
        return peers(data, PLAIN if name == "plain" else REUSED)
    makers = dict(machine=machine, limits=limits, calls=calls)
    return makers[name](data) if name in makers else recurrence(data, name)


def render(page: str, results: dict[str, Row]) -> str:
    """The page, with each part between its comments made anew."""

    def made(match: re.Match[str]) -> str:
        parts = [
            f"**{data['device']}**\n\n{part(match[1], slug, data)}"
            for slug, data in results.items()
        ]
        parts = parts or [EMPTY]
        return "\n\n".join([f"<!-- {match[1]} -->", *parts, "<!-- end -->"])

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def main() -> None:
    results = load()
    PAGE.write_text(render(PAGE.read_text(), results))
    for slug, data in results.items():
        for file, (_, text) in pictures(slug, data).items():
            (DOCS / file).write_text(text)
    print("For the README:", *map(readme, results.values()), sep="\n")


if __name__ == "__main__":
    main()

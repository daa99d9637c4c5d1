"""Times beside a copy, beside `x + 1`, and beside other frameworks on this machine.

Every row is checked for right answers before it is timed. Rows go into one JSON file
for each machine as they are known; a row that the machine was too noisy to tell is
measured again, and says so if that does not help.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import report
from benchmarks.contenders import OURS
from benchmarks.results import Results, machine
from benchmarks.rows import Options, Row, all_rows


def table(name: str, row: Row) -> Table:
    """One line for each contender: its time, and its ratio to what stands beside it."""
    limits = list(dict.fromkeys(label for t in row["times"] for label in t["to"]))
    noise = row["noise"]
    verdict = "quiet" if noise["quiet"] else "[bold red]TOO NOISY TO TELL"
    caption = [f"{peer}: {why}" for peer, why in row.get("absent", {}).items()]
    out = Table(
        title=f"{name}: {verdict}, the same thing differs by "
        f"{100 * noise['resolution']:.1f}%",
        title_justify="left",
        caption="\n".join(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for column in ("", "output"):
        out.add_column(column, no_wrap=True)
    for column in ("ms", "spread", *limits):
        out.add_column(column, justify="right", no_wrap=True)
    for t in row["times"]:
        low, high = t["quartiles"]
        out.add_row(
            t["name"] + (f", {t['direction']}" * (t["direction"] != "forward")),
            t["regime"],
            f"{1e3 * t['seconds']:.3g}",
            f"{100 * (high - low) / t['seconds']:.0f}%",
            *(_ratio(t["to"].get(label)) for label in limits),
            style="bold" if t["name"] == OURS else None,
        )
    return out


def _ratio(ratio: Row | None) -> str:
    """A ratio whose error is past a tenth of it has a tilde."""
    if not ratio:
        return ""
    return f"{'~' * (10 * ratio['error'] > ratio['ratio'])}{ratio['ratio']:.2f}"


def extras(row: Row) -> dict[str, Any]:
    """What a row knows beside times and what every row has."""
    keys = ("temporary_bytes", "import", "fresh output", "40 calls")
    return {key: row[key] for key in keys if row.get(key)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--filter", default="", help="a regular expression that names of rows contain"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--device", default=None, help="cpu, gpu or tpu; JAX's default")
    parser.add_argument("--json", type=Path, help="write here, not to results/")
    parser.add_argument(
        "--resume", action="store_true", help="leave out rows that are there and quiet"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes; times mean nothing"
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="of timing for each row, about"
    )
    parser.add_argument(
        "--tries", type=int, default=2, help="how often to measure a noisy row"
    )
    parser.add_argument(
        "--plot", action="store_true", help="then bring docs/performance.md up to date"
    )
    args = parser.parse_args(argv)
    if args.quick and args.plot:
        parser.error("--quick gives times that mean nothing; --plot would print them")
    return args


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console()
    rows = all_rows(args.quick)
    chosen = [name for name in rows if re.search(args.filter, name)]
    if args.list:
        print("\n".join(chosen))
        return 0
    if not chosen:
        console.print(f"No row is named like {args.filter!r}; --list names them.")
        return 2
    device = jax.devices(args.device)[0]
    results = None
    if args.json or not args.quick:  # Quick figures never lie among the real ones.
        results = Results(args.json, device)
        if args.resume:
            chosen = [name for name in chosen if not results.has(name)]
    options = Options(device, args.seconds)
    if args.quick:
        options = options._replace(seconds=0.0, least_rounds=2)
        args.tries = 1
    console.print(f"{machine(device)['device']}; JAX {jax.__version__}", style="bold")
    noisy = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            row = rows[name](options)
            for _ in range(args.tries - 1):
                if row["noise"]["quiet"]:
                    break
                time.sleep(2)  # What makes the noise may end.
                row = min(row, rows[name](options), key=_resolution)
            if not row["noise"]["quiet"]:
                noisy.append(name)
            if results is not None:
                results.add(name, row)
            console.print(table(name, row))
            for what, found in extras(row).items():
                console.print(f"{what}: {found}", highlight=False)
            progress.advance(task)
    if noisy:
        console.print(f"TOO NOISY TO TELL: {', '.join(noisy)}", style="bold red")
    if results is not None:
        console.print(f"{len(chosen)} rows written to {results.path}")
    if args.plot:
        report.main([])
    return 0


def _resolution(row: Row) -> float:
    return row["noise"]["resolution"]


if __name__ == "__main__":
    sys.exit(main())

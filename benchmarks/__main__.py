"""Times beside a copy and beside other libraries, on your machine.

Each contender is checked before it is timed, and all contenders of a row take turns. A
ratio stands with two standard errors. Rows go into one JSON file for each machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from benchmarks import recurrences, report
from benchmarks.calls import measure_calls
from benchmarks.results import Results, machine
from benchmarks.reversals import measure_case
from benchmarks.timing import LIMIT, Options, Row
from tests.cases import BENCHMARKS, Case

SMALL, LARGE, LONG = (32, 128, 32, 64), (32, 64, 64, 256), (8, 512, 32, 64)
RECURRENCES = (
    *(("scan", "GRU", shape) for shape in (SMALL, LARGE)),
    *(("scan", "packed GRU", SMALL),),
    *(("scan", kind, (64, 1024, 64, 64)) for kind in ("linear", "packed linear")),
    *(("scan", kind, (256, 1024, 1)) for kind in ("returns", "packed returns")),
    *(
        ("chunk", part, shape)
        for shape in ((64, 512, 64, 128), (32, 256, 64, 256))
        for part in ("all", "half", "quarter")
    ),
    *(("associative", rows, (256, 2048, 1)) for rows in ("padded", "packed")),
    *(("associative", "packed", (8, 2048, 64)),),
    *(
        ("bidirectional", cell, shape)
        for cell in ("GRU", "LSTM")
        for shape in (SMALL, LARGE, LONG)
    ),
)


def small(case: Case) -> Case:
    """The case at a size that takes no time."""
    shape = tuple(min(n, 32) for n in case.shape)
    return dataclasses.replace(case, shape=shape, count=min(case.count, 4))


def all_rows(quick: bool = False) -> dict[str, Callable[[Options], Row]]:
    """Every row by its name, in the order in which the rows run."""
    cut = small if quick else lambda case: case
    rows: dict[str, Callable[[Options], Row]] = {
        case.name: partial(measure_case, cut(case)) for case in BENCHMARKS
    }
    rows["calls"] = measure_calls
    for group, kind, shape in RECURRENCES:
        name = " ".join([group, kind, "x".join(map(str, shape))])
        function = getattr(recurrences, f"measure_{group}")
        shape = (4, 16, 8, 8)[: len(shape)] if quick else shape
        rows[name] = partial(function, kind, shape)
    return rows


def show(name: str, row: Row) -> None:
    noisy = ", TOO NOISY" * (row["noise"] > LIMIT)
    print(f"{name}: a contender differs from itself by {row['noise']:.1%}{noisy}")
    for t in row["times"]:
        what = f"{t['name']}, {t['output']}, {t['direction']}"
        ratios = [f"{report.ratio(t, base):>15} {base}" for base in t["to"]]
        print(f"  {what:46}{1e3 * t['seconds']:9.4g} ms", *ratios)
    for way, size in row.get("gradient_bytes", {}).items():
        print(f"  {way + ', temporary memory of the gradient':65}{size / 1e6:9.4g} MB")
    for peer, why in row.get("absent", {}).items():
        print(f"  {peer}: {why}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--filter", default="", help="a regular expression that a row's name contains")
    add("--list", action="store_true", help="print the names and stop")
    add("--device", help="cpu, gpu or tpu; the default is JAX's")
    add("--json", type=Path, help="write here, not to benchmarks/results/")
    add("--quick", action="store_true", help="tiny sizes; times mean nothing")
    add("--seconds", type=float, default=6, help="of timing for each row")
    add("--tries", type=int, default=2, help="how often to measure a noisy row")
    add("--page", action="store_true", help="then bring the pages up to date")
    args = parser.parse_args(argv)
    if args.quick and args.page:
        parser.error("times with --quick mean nothing, and --page would print them")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = {k: v for k, v in all_rows(args.quick).items() if re.search(args.filter, k)}
    if args.list or not rows:
        print("\n".join(rows) or f"no row's name contains {args.filter!r}; see --list")
        return 0 if rows else 2
    options = Options(0.0, 2) if args.quick else Options(args.seconds)
    with jax.default_device(jax.devices(args.device)[0]):
        # Quick figures never go among the real ones.
        results = Results(args.json) if args.json or not args.quick else None
        print(f"{machine()}; JAX {jax.__version__}", flush=True)
        for i, (name, measure) in enumerate(rows.items(), 1):
            row = measure(options)
            for _ in range(0 if args.quick else args.tries - 1):
                if row["noise"] > LIMIT:
                    row = min(row, measure(options), key=lambda row: row["noise"])
            print(f"[{i}/{len(rows)}] ", end="")
            show(name, row)
            sys.stdout.flush()
            if results is not None:
                results.add(name, row)
    if results is not None:
        tables = [report.part(part, "", results.data) for part in report.PARTS[:-1]]
        print("", *(text for text in tables if text != report.EMPTY), sep="\n\n")
        print(f"\n{len(rows)} rows written to {results.path}")
    if args.page:
        report.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())

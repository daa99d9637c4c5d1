"""The machine, the versions, and one JSON file of rows for each machine.

A row names the run that it is from: a file may be filled in several runs.
"""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax_revseg
from benchmarks.timing import Row, device

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "torch", "onnxruntime", "tensorflow-cpu")


def machine() -> str:
    """The name of the device that is timed."""
    if device().platform != "cpu":
        return device().device_kind
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{re.sub(r'[(](R|TM)[)]| CPU', '', name)}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    found = dict(python=platform.python_version(), jax_revseg=jax_revseg.__version__)
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


class Results:
    """The file of one machine; every row is written as soon as it is known."""

    def __init__(self, path: Path | None):
        slug = re.sub(r"[^a-z0-9.]+", "-", machine().lower())
        self.path = path or FOLDER / f"{slug}.json"
        self.data: dict[str, Any] = dict(device=machine(), runs={}, rows={})
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        self.at = datetime.now(UTC).isoformat(timespec="seconds")
        self.run = dict(versions=versions())

    def add(self, name: str, row: Row) -> None:
        rows, runs = self.data["rows"], self.data["runs"]
        rows[name] = {"run": self.at, **row}
        runs[self.at] = self.run
        used = {row["run"] for row in rows.values()}
        self.data["runs"] = {at: run for at, run in runs.items() if at in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(_to_json(self.data))
        part.replace(self.path)  # The file is whole, also when a run is interrupted.


def _to_json(data: dict[str, Any]) -> str:
    """One line for each row and each run, so that a diff is readable."""

    def block(entries: dict[str, Any]) -> str:
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
        return "{\n" + ",\n".join(lines) + "\n}"

    return (
        f'{{"device": {json.dumps(data["device"])},\n'
        f'"runs": {block(data["runs"])},\n"rows": {block(data["rows"])}}}\n'
    )

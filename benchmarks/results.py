"""The machine, the versions, and one JSON file of rows for each machine.

A row says which run it is from, and a run says when, with what versions and source: a
file may be filled in several runs, and no figure loses what it was measured with.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax_revseg
from benchmarks.contenders import Device

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    *("jax", "jaxlib", "numpy", "flax", "torch", "onnxruntime"),
    *("tensorflow", "tensorflow-cpu"),
)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source() -> str:
    """A hash of the library's code, by which stale figures can be told."""
    files = sorted(Path(jax_revseg.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.machine()
    return re.sub(r"\((R|TM)\)| CPU| Processor", "", name)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: Device) -> dict[str, Any]:
    on_cpu = device.platform == "cpu"
    return {
        "device": f"{_cpu()}, {_cores()} cores" if on_cpu else device.device_kind,
        "platform": device.platform,
        "cpu": _cpu(),
        "cores": _cores(),
        "system": platform.system(),
    }


def this_run() -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {
            "jax_revseg": jax_revseg.__version__,
            **{name: v for name in PACKAGES if (v := _version(name))},
        },
        "source": source(),
    }


class Results:
    """The file of one machine; every row is written as soon as it is known."""

    def __init__(self, path: Path | None, device: Device):
        name = machine(device)["device"].lower()
        name = re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
        self.path = path or FOLDER / f"{name}.json"
        self.data: dict[str, Any] = {"machine": machine(device), "runs": {}, "rows": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        self.run = this_run()

    def has(self, name: str) -> bool:
        """Whether this source has already given that row in quiet."""
        row = self.data["rows"].get(name)
        if row is None or not row["noise"]["quiet"]:
            return False
        return self.data["runs"][row["run"]]["source"] == self.run["source"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        rows, runs = self.data["rows"], self.data["runs"]
        rows[name] = {"run": self.run["at"], **row}
        runs[self.run["at"]] = self.run
        used = {row["run"] for row in rows.values()}
        self.data["runs"] = {at: run for at, run in runs.items() if at in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(_json(self.data) + "\n")
        part.replace(self.path)  # Whole, also when interrupted.


def _json(value: Any, indent: int = 0) -> str:
    """A line for what fits on one, so that the diff of two runs can be read."""
    line = json.dumps(value)
    if indent + len(line) <= 400 or not isinstance(value, dict | list):
        return line
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, list):
        parts, ends = [_json(v, indent + 1) for v in value], "[]"
    else:
        parts = [f"{json.dumps(k)}: {_json(v, indent + 1)}" for k, v in value.items()]
        ends = "{}"
    return f"{ends[0]}{pad}{f',{pad}'.join(parts)}{pad[:-1]}{ends[1]}"

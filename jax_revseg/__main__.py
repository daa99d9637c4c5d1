"""Self-check and speed on this machine: `python -m jax_revseg`.

Every encoding of the segments, forward and gradient, is compared bit for bit with the
NumPy loops of `_reference.py` on each kind of device that JAX finds, and a few sizes
are timed beside a copy on the same device. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import __version__, _reference, reverse_segments, reverse_sequence

# Lengths of 0, 1 and T; past both ends, which are clipped on a device; and ordinary.
ROWS, STEPS = 6, 300
LENGTHS = np.array([0, 1, STEPS, STEPS + 50, -3, 171], np.int32)
PACKED = [[3, 0, 4], [0, 0, 0], [300, 9, 9], [299, 1, 0], [-2, 5, 260], [100, 150, 7]]
PACKED = np.array(PACKED, np.int32)
OFFSETS = np.pad(np.clip(PACKED, 0, STEPS // 2).cumsum(1), [(0, 0), (1, 0)])
IDS = (np.arange(STEPS) + 7 * np.arange(ROWS)[:, None]) // 20 % 4  # 0 is padding.
Case = namedtuple("Case", "name layout argument segments options", defaults=[{}])
CASES = [
    Case("lengths (N,)", "padded", "lengths", LENGTHS),
    Case("lengths (N,), time-major", "padded", "lengths", LENGTHS, {"axis": 0}),
    Case("lengths (N,), filled", "padded", "lengths", LENGTHS, {"padding_value": 0}),
    Case("lengths (N, K)", "packed", "lengths", PACKED),
    Case("cu_seqlens (N, K + 1)", "packed", "cu_seqlens", OFFSETS),
    Case("segment_ids (N, T)", "ids", "segment_ids", IDS, {"padding_id": 0}),
]
# Features and dtype; --quick takes the first two.
DATA = [((), "float32"), ((256,), "float32"), ((3,), "bfloat16"), ((), "int8")]
# Rows, steps, features, segments a row: 32 MB of float32 each.
SIZES = [(64, 512, 256, 1), (1024, 8192, 1, 1), (16, 2048, 256, 16)]


def check_case(case, features, dtype, device) -> dict[str, Any]:
    """Whether values and gradient are right; an integer's gradient is None."""
    axis = case.options.get("axis", 1)
    shape = ((STEPS, ROWS) if axis == 0 else (ROWS, STEPS)) + features
    # All bits, but no NaN where XLA selects: a select may set the quiet bit of a NaN.
    high = 64 if "padding_value" in case.options else 256
    kind, rng = jnp.dtype(dtype), np.random.default_rng(0)
    bits = rng.integers(0, high, (2, *shape, kind.itemsize), np.uint8)
    x, ct = bits.view(kind)[..., 0]
    reverse = reverse_sequence if case.layout == "padded" else reverse_segments
    run = jax.jit(lambda x, s: reverse(x, **{case.argument: s}, **case.options))
    segments, offsets = case.segments, case.argument == "cu_seqlens"
    options = {"axis": axis, "batch_axes": (1 - axis,), "layout": case.layout}
    reference = partial(_reference.reverse, **(options | case.options))

    def right(out, given):
        want = reference(given, np.diff(segments) if offsets else segments)
        return np.asarray(out).tobytes() == want.tobytes()

    result = dict(encoding=case.name, shape=shape, dtype=dtype)
    result |= dict(forward=False, gradient=False)
    try:
        with jax.debug_nans(False), jax.debug_infs(False):  # NaNs are on purpose.
            *primals, there = jax.device_put((x, segments, ct), device)
            out, vjp = jax.vjp(run, *primals)
            result["forward"] = right(out, x)
            inexact = jnp.issubdtype(kind, jnp.inexact)
            result["gradient"] = right(vjp(there)[0], ct) if inexact else None
    except Exception as error:  # A report must name whatever a compiler raises.
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def time_case(shape, segments_per_row, device) -> dict[str, Any]:
    """The time of a reversal beside that of a copy, both into donated memory."""
    reverse, size = reverse_sequence, shape[:1]
    if segments_per_row > 1:
        reverse, size = reverse_segments, (shape[0], segments_per_row)
    high = shape[1] // segments_per_row + 1
    lengths = np.random.default_rng(0).integers(0, high, size, np.int32)
    x, lengths = jax.device_put((np.zeros(shape, np.float32), lengths), device)
    functions = (lambda x, s, out: reverse(x, s), lambda x, s, out: jnp.copy(x))
    runs = [jax.jit(f, donate_argnums=2, keep_unused=True) for f in functions]
    outs = [jnp.zeros_like(x) for _ in runs]
    # On an accelerator a long burst hides the dispatch of its calls.
    burst = 3 if device.platform == "cpu" else 32
    times = np.zeros((8, 2))
    for repeat, (i, run) in product(range(8), enumerate(runs)):
        start = time.perf_counter()
        for _ in range(burst):
            outs[i] = run(x, lengths, outs[i])
        outs[i].block_until_ready()
        times[repeat, i] = (time.perf_counter() - start) / burst * 1e3
    ours, copy = times[1:].T  # The first calls compile and touch the memory.
    ms, copy_ms, ratio = np.median([ours, copy, ours / copy], 1).round(4).tolist()
    result = {"shape": shape, "dtype": "float32", "segments_per_row": segments_per_row}
    return result | {"ms": ms, "copy_ms": copy_ms, "ratio": ratio}


def _row(first: Any, *rest: Any) -> str:
    return f"  {first!s:24} {' '.join(f'{value!s:14}' for value in rest)}".rstrip()


def report(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All checks and times on one device of each kind; says each result at once."""
    versions = {p: metadata.version(p) for p in ("jax", "jaxlib", "numpy")}
    versions |= {"jax_revseg": __version__, "python": platform.python_version()}
    result: dict[str, Any] = {"versions": versions, "machine": platform.platform()}
    result["devices"] = [str(device) for device in jax.devices()]
    result["platform_version"] = jax.devices()[0].client.platform_version
    for name, value in result.items():
        say(f"{name}: {value}")
    checks, times = result["checks"], result["times"] = [], []
    devices, words = jax.local_devices(), {True: "right", False: "WRONG", None: "-"}
    with suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out.
        devices = [*devices, *jax.local_devices(backend="cpu")]
    kinds = {f"{d.platform} ({d.device_kind})": d for d in devices}  # One of each.
    for kind, device in kinds.items():
        say(f"\n{kind}\n{_row('', 'shape', 'dtype', 'forward', 'gradient')}")
        for case, (features, dtype) in product(CASES, DATA[: 2 if quick else 4]):
            check = check_case(case, features, dtype, device)
            say(_row(*(words.get(value, value) for value in check.values())))
            checks.append({"device": kind, **check})
        scale = 1 if device.platform == "cpu" else 8  # 32 MB would fit into a cache.
        for rows, *rest, segments in () if quick else SIZES:
            timing = time_case((rows * scale, *rest), segments, device)
            text = f"{timing['ms']:.3g} ms, {timing['ratio']:.2f} to a copy"
            say(_row(timing["shape"], f"{segments} a row:", text))
            times.append({"device": kind, **timing})
    failed = sum(False in (c["forward"], c["gradient"]) for c in checks)
    result["ok"] = bool(checks) and not failed
    where = f"{len(checks)} checks on {', '.join(kinds)}"
    result["summary"] = f"All is right: {where}."
    if not result["ok"]:
        result["summary"] = f"SOMETHING IS WRONG: {failed} of {where} failed; please "
        result["summary"] += "report the output of `python -m jax_revseg --json`."
    say(f"\n{result['summary']}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_revseg", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer checks, no times")
    args = parser.parse_args(argv)
    result = report(args.quick, (lambda line: None) if args.json else print)
    if args.json:
        print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

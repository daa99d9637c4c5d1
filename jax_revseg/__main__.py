"""Self-check and speed on this machine: `python -m jax_revseg`.

Every encoding of the segments, forward and gradient, is compared bit for bit with the
NumPy loops of `_reference.py` on each kind of device that JAX finds, and a few sizes
are timed beside a copy on the same device. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_revseg
from jax_revseg import _reference, reverse_segments, reverse_sequence

# Lengths of 0, 1 and T; past both ends, which are clipped on a device; and ordinary.
ROWS, STEPS = 6, 300
LENGTHS = np.array([0, 1, STEPS, STEPS + 50, -3, 171], np.int32)
PACKED = np.array(
    [[3, 0, 4], [0, 0, 0], [STEPS, 9, 9], [299, 1, 0], [-2, 5, 260], [100, 150, 7]],
    np.int32,
)
OFFSETS = np.pad(np.clip(PACKED, 0, STEPS // 2).cumsum(1), [(0, 0), (1, 0)])
IDS = np.repeat(np.arange(STEPS // 20, dtype=np.int32) % 4, 20)  # 0, the padding, too.
IDS = np.stack([np.roll(IDS, 7 * row) for row in range(ROWS)])
# Rows, steps, features, segments a row: 32 MB of float32 each.
SIZES = [(64, 512, 256, 1), (1024, 8192, 1, 1), (16, 2048, 256, 16)]

Say = Callable[[str], None]


class Case(NamedTuple):
    """One way to say where the segments lie, and the reference's word for it."""

    name: str
    layout: str
    argument: str
    segments: np.ndarray
    options: dict[str, Any] = {}


CASES = [
    Case("lengths (N,)", "padded", "lengths", LENGTHS),
    Case("lengths (N,), time-major", "padded", "lengths", LENGTHS, {"axis": 0}),
    Case("lengths (N,), filled", "padded", "lengths", LENGTHS, {"padding_value": 0}),
    Case("lengths (N, K)", "packed", "lengths", PACKED),
    Case("cu_seqlens (N, K + 1)", "packed", "cu_seqlens", OFFSETS),
    Case("segment_ids (N, T)", "ids", "segment_ids", IDS, {"padding_id": 0}),
]


def _random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Any value that the dtype has, NaN payloads and denormals among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def check_case(
    case: Case, features: tuple[int, ...], dtype: Any, device: Any
) -> dict[str, Any]:
    """Whether values and gradient are right; null for what does not apply."""
    axis = case.options.get("axis", 1)
    shape = ((STEPS, ROWS) if axis == 0 else (ROWS, STEPS)) + features
    rng = np.random.default_rng(0)
    x, ct = (_random_bits(rng, shape, dtype) for _ in range(2))
    if "padding_value" in case.options:  # XLA's select may set the quiet bit of a NaN.
        with np.errstate(invalid="ignore"):
            x, ct = (np.where(a == a, a, np.nan).astype(dtype) for a in (x, ct))
    reverse = reverse_sequence if case.layout == "padded" else reverse_segments

    def function(x: jax.Array, segments: jax.Array) -> jax.Array:
        return reverse(x, **{case.argument: segments}, **case.options)

    def gradient(x: jax.Array, segments: jax.Array, ct: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: function(x, segments), x)[1](ct)[0]

    def right(out: Any, given: np.ndarray) -> bool:
        offsets = case.argument == "cu_seqlens"
        segments = np.diff(case.segments) if offsets else case.segments
        options = {"axis": axis} | case.options
        want = _reference.reverse(
            given, segments, batch_axes=(1 - axis,), layout=case.layout, **options
        )
        return np.asarray(out).tobytes() == want.tobytes()

    result: dict[str, Any] = {"encoding": case.name, "shape": list(shape)}
    result |= {"dtype": str(x.dtype), "forward": False, "gradient": None}
    try:
        # The values are NaN on purpose.
        with jax.debug_nans(False), jax.debug_infs(False):
            operands = jax.device_put((x, case.segments, ct), device)
            result["forward"] = right(jax.jit(function)(*operands[:2]), x)
            if jnp.issubdtype(dtype, jnp.inexact):
                result["gradient"] = right(jax.jit(gradient)(*operands), ct)
    except Exception as error:  # A report must name whatever a compiler raises.
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def time_case(
    shape: tuple[int, ...], segments_per_row: int, device: Any
) -> dict[str, Any]:
    """The time of a reversal beside that of a copy, both into donated memory."""
    rng = np.random.default_rng(0)
    reverse, size = reverse_sequence, shape[:1]
    if segments_per_row > 1:
        reverse, size = reverse_segments, (shape[0], segments_per_row)
    lengths = rng.integers(0, shape[1] // segments_per_row + 1, size, np.int32)
    x, lengths = jax.device_put((np.zeros(shape, np.float32), lengths), device)
    runs = [
        jax.jit(lambda x, s, out: reverse(x, s), donate_argnums=2, keep_unused=True),
        jax.jit(lambda x, s, out: jnp.copy(x), donate_argnums=2, keep_unused=True),
    ]
    outs = [jnp.zeros_like(x), jnp.zeros_like(x)]
    # On an accelerator a long burst hides the dispatch of its calls.
    burst = 3 if device.platform == "cpu" else 32
    samples: list[list[float]] = [[], []]
    for repeat in range(8):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            for _ in range(burst):
                outs[i] = run(x, lengths, outs[i])
            outs[i].block_until_ready()
            if repeat > 0:  # The first calls compile and touch the memory.
                samples[i].append((time.perf_counter() - start) / burst * 1e3)
    ratio = statistics.median(a / b for a, b in zip(*samples, strict=True))
    ms, copy_ms = (round(statistics.median(times), 4) for times in samples)
    result = {"shape": list(shape), "dtype": "float32"}
    result |= {"segments_per_row": segments_per_row}
    return result | {"ms": ms, "copy_ms": copy_ms, "ratio": round(ratio, 3)}


def _devices() -> dict[str, Any]:
    """One device of each kind."""
    kinds: dict[str, Any] = {}
    for backend in dict.fromkeys((jax.default_backend(), "cpu")):
        try:
            devices = jax.local_devices(backend=backend)
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
            continue
        for device in devices:
            kinds.setdefault(f"{device.platform} ({device.device_kind})", device)
    return kinds


def _check_all(kind: str, device: Any, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Every encoding with several dtypes; says each result at once."""
    words = {True: "right", False: "WRONG", None: "-"}
    data: list[tuple[tuple[int, ...], Any]] = [((), jnp.float32), ((256,), jnp.float32)]
    if not quick:
        data += [((3,), jnp.bfloat16), ((), jnp.int8)]
    say(f"\n{kind}\n  {'':26} {'shape':15} {'dtype':9} forward  gradient")
    checks = []
    for case, (features, dtype) in product(CASES, data):
        check = {"device": kind, **check_case(case, features, dtype, device)}
        checks.append(check)
        say(
            f"  {check['encoding']:26} {str(tuple(check['shape'])):15} "
            f"{check['dtype']:9} {words[check['forward']]:8} "
            f"{words[check['gradient']]} {check.get('error', '')}".rstrip()
        )
    return checks


def _time_all(kind: str, device: Any, say: Say) -> list[dict[str, Any]]:
    """A few sizes beside a copy; says each result at once."""
    say(f"\n  {'float32, donated output':26} segments  ms       to a copy")
    scale = 1 if device.platform == "cpu" else 8  # 32 MB would fit into a cache.
    times = []
    for rows, *rest, segments in SIZES:
        timing = time_case((rows * scale, *rest), segments, device)
        times.append({"device": kind, **timing})
        say(
            f"  {str(tuple(timing['shape'])):26} {segments:<9} "
            f"{timing['ms']:<8.3g} {timing['ratio']:.2f}"
        )
    return times


def report(quick: bool, say: Say) -> dict[str, Any]:
    """All checks and times on one device of each kind."""
    versions = {p: metadata.version(p) for p in ("jax", "jaxlib", "numpy")}
    versions |= {"jax_revseg": jax_revseg.__version__}
    versions |= {"python": platform.python_version()}
    result: dict[str, Any] = {"versions": versions, "machine": platform.platform()}
    result["devices"] = [str(device) for device in jax.devices()]
    result["platform_version"] = jax.devices()[0].client.platform_version
    checks, times = result["checks"], result["times"] = [], []
    say(", ".join(f"{name} {version}" for name, version in versions.items()))
    say(f"{result['machine']}; devices: {', '.join(result['devices'])}")
    kinds = _devices()
    for kind, device in kinds.items():
        checks += _check_all(kind, device, quick, say)
        times += [] if quick else _time_all(kind, device, say)
    bad = [c for c in checks if False in (c["forward"], c["gradient"]) or "error" in c]
    result["ok"] = bool(checks) and not bad
    where = f"{len(checks)} checks on {', '.join(kinds)}"
    result["summary"] = f"All is right: {where}."
    if not result["ok"]:
        result["summary"] = (
            f"SOMETHING IS WRONG: {len(bad)} of {where} failed; please report it with "
            "the output of `python -m jax_revseg --json`."
        )
    say("\ntimes: not run, because of --quick\n" if quick else "")
    say(result["summary"])
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

"""Self-check and speed on this machine: `python -m jax_revseg`.

Every encoding of the segments, forward and gradient, is compared bit for bit with the
NumPy loops of `_reference.py` on each kind of device that JAX finds, and a few sizes
are timed against a copy on the same device. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from itertools import product
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

import jax_revseg
from jax_revseg import _reference, reverse_segments, reverse_sequence
from jax_revseg._primitive import Implementation

# Lengths of 0, 1 and T; past both ends, which a device cuts to the axis; and ordinary.
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


class Case(NamedTuple):
    """One way to say where the segments lie, and the reference's word for it."""

    name: str
    layout: str
    argument: str
    segments: np.ndarray
    options: dict[str, Any]


CASES = [
    Case("lengths (N,)", "padded", "lengths", LENGTHS, {}),
    Case("lengths (N,), time-major", "padded", "lengths", LENGTHS, {"axis": 0}),
    Case(
        "lengths (N,), overwritten", "padded", "lengths", LENGTHS, {"padding_value": 0}
    ),
    Case("lengths (N, K)", "packed", "lengths", PACKED, {}),
    Case("cu_seqlens (N, K + 1)", "packed", "cu_seqlens", OFFSETS, {}),
    Case("segment_ids (N, T)", "ids", "segment_ids", IDS, {"padding_id": 0}),
]


def _bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def _random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Any value that the dtype has, NaN payloads and denormals among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def check_case(
    case: Case, features: tuple[int, ...], dtype: Any, device: Any, implementation: str
) -> dict[str, Any]:
    """Whether values and gradient are right; null for what does not apply."""
    axis = case.options.get("axis", 1)
    shape = (STEPS, ROWS) if axis == 0 else (ROWS, STEPS)
    rng = np.random.default_rng(0)
    x, ct = (_random_bits(rng, (*shape, *features), dtype) for _ in range(2))
    if "padding_value" in case.options:  # XLA's select may set the quiet bit of a NaN.
        with np.errstate(invalid="ignore"):
            x, ct = (np.where(a == a, a, np.nan).astype(dtype) for a in (x, ct))
    result: dict[str, Any] = {
        "encoding": case.name,
        "implementation": implementation,
        "shape": list(x.shape),
        "dtype": str(x.dtype),
        "forward": False,
        "gradient": None,
    }

    def function(x: jax.Array, segments: jax.Array) -> jax.Array:
        reverse = reverse_sequence if case.layout == "padded" else reverse_segments
        named = {case.argument: segments, "implementation": implementation}
        return reverse(x, **named, **case.options)

    def gradient(ct: jax.Array, x: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: function(x, segments), x)[1](ct)[0]

    def reference(array: np.ndarray) -> np.ndarray:
        # Offsets are checked through the lengths that lie between them.
        offsets = case.argument == "cu_seqlens"
        return _reference.reverse(
            array,
            np.diff(case.segments) if offsets else case.segments,
            axis=axis,
            batch_axes=(1 - axis,),
            layout=case.layout,
            padding_id=case.options.get("padding_id"),
            padding_value=case.options.get("padding_value"),
        )

    try:
        operands = jax.device_put((x, case.segments), device)
        out = jax.jit(function)(*operands)
        result["forward"] = _bits(out) == _bits(reference(x))
        if jnp.issubdtype(dtype, jnp.inexact):
            out = jax.jit(gradient)(jax.device_put(ct, device), *operands)
            result["gradient"] = _bits(out) == _bits(reference(ct))
    except Exception as error:  # A compiler that fails is what we want to hear of.
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def _seconds(run: Callable[..., jax.Array], operands: Any, out: jax.Array, n: int):
    """The time of one call, each writing into the output of the one before."""
    start = time.perf_counter()
    for _ in range(n):
        out = run(*operands, out)
    out.block_until_ready()
    return (time.perf_counter() - start) / n, out


def time_case(
    shape: tuple[int, ...], segments_per_row: int, device: Any, implementation: str
) -> dict[str, Any]:
    """The time of a reversal beside that of a copy, both into donated memory."""
    rng = np.random.default_rng(0)
    if segments_per_row == 1:
        function = reverse_sequence
        lengths = rng.integers(0, shape[1] + 1, shape[0], np.int32)
    else:
        function = reverse_segments
        most = shape[1] // segments_per_row
        lengths = rng.integers(0, most + 1, (shape[0], segments_per_row), np.int32)
    with jax.default_device(device):
        x = jnp.zeros(shape, jnp.float32)
        outs = [jnp.zeros_like(x), jnp.zeros_like(x)]
    operands = [(x, jax.device_put(lengths, device)), (x,)]
    ours = partial(function, implementation=implementation)
    runs = [
        jax.jit(lambda x, s, out: ours(x, s), donate_argnums=2, keep_unused=True),
        jax.jit(lambda x, out: jnp.copy(x), donate_argnums=1, keep_unused=True),
    ]
    # On an accelerator the dispatch of a call hides behind the ones before, if the
    # burst is long; a CPU needs milliseconds for each anyway.
    burst = 3 if device.platform == "cpu" else 32
    samples: list[list[float]] = [[], []]
    for repeat in range(8):
        for i, run in enumerate(runs):
            seconds, outs[i] = _seconds(run, operands[i], outs[i], burst)
            if repeat > 0:  # The first calls compile and touch the memory.
                samples[i].append(seconds)
    seconds, copy_seconds = map(statistics.median, samples)
    return {
        "implementation": implementation,
        "shape": list(shape),
        "dtype": "float32",
        "segments_per_row": segments_per_row,
        "ms": round(seconds * 1e3, 4),
        "copy_ms": round(copy_seconds * 1e3, 4),
        "ratio": round(
            statistics.median(a / b for a, b in zip(*samples, strict=True)), 3
        ),
    }


def report(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """All checks and times on one device of each kind, saying each as it is known."""
    kinds: dict[str, Any] = {}
    for backend in dict.fromkeys((jax.default_backend(), "cpu")):
        try:
            devices = jax.local_devices(backend=backend)
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
            continue
        for device in devices:
            kinds.setdefault(f"{device.platform} ({device.device_kind})", device)
    result: dict[str, Any] = {
        "versions": {
            "jax_revseg": jax_revseg.__version__,
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.platform(),
        "devices": [str(device) for device in jax.devices()],
        "platform_version": jax.devices()[0].client.platform_version,
        "checks": [],
        "times": [],
    }
    say(", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    say(f"{result['machine']}; devices: {', '.join(result['devices'])}")

    words = {True: "right", False: "WRONG", None: "-"}
    data: list[tuple[tuple[int, ...], Any]] = [((), jnp.float32), ((256,), jnp.float32)]
    if not quick:
        data += [((3,), jnp.bfloat16), ((), jnp.int8)]
    for kind, device in kinds.items():
        # Anywhere else, "pallas" is the same gather.
        tpu = device.platform == "tpu"
        implementations = get_args(Implementation) if tpu else ("xla",)
        # The kernel for TPUs treats small values in a way of its own.
        small = [((256,), jnp.bfloat16), ((256,), jnp.int8)] if tpu else []
        say(f"\n{kind}\n  {'':28} {'shape':16} {'dtype':9} {'by':7} forward  gradient")
        for case, (features, dtype), by in product(
            CASES, data + small, implementations
        ):
            check = {"device": kind, **check_case(case, features, dtype, device, by)}
            result["checks"].append(check)
            say(
                f"  {check['encoding']:28} {str(tuple(check['shape'])):16} "
                f"{check['dtype']:9} {by:7} {words[check['forward']]:8} "
                f"{words[check['gradient']]} {check.get('error', '')}".rstrip()
            )
        if quick:
            continue
        say(f"\n  {'float32, donated output':28} segments  {'by':7} ms       to a copy")
        scale = 1 if device.platform == "cpu" else 8  # 32 MB would fit into a cache.
        for (rows, *rest, segments), by in product(SIZES, implementations):
            shape = (rows * scale, *rest)
            timing = {"device": kind, **time_case(shape, segments, device, by)}
            result["times"].append(timing)
            say(
                f"  {str(shape):28} {segments:<9} {by:7} {timing['ms']:<8.3g} "
                f"{timing['ratio']:.2f}"
            )

    wrong = [
        check
        for check in result["checks"]
        if False in (check["forward"], check["gradient"]) or "error" in check
    ]
    count, where = len(result["checks"]), ", ".join(kinds)
    result["ok"] = count > 0 and not wrong
    result["summary"] = (
        f"All is right: {count} checks on {where}."
        if result["ok"]
        else f"SOMETHING IS WRONG: {len(wrong)} of {count} checks on {where} failed; "
        "please report it with the output of `python -m jax_revseg --json`."
    )
    if quick:
        say("\ntimes: not run, because of --quick")
    say("\n" + result["summary"])
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

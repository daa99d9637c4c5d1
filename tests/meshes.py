"""What the sharding tests share: meshes, cases of 8 rows, and the HLO's collectives."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from tests.cases import Case

# Eight rows, for a mesh of 4 by 2 devices.
CASES = tuple(
    Case(f"{layout}-sharded", (8, 6, 4), layout=layout, padding_id=0)
    for layout in ("padded", "packed", "ids")
)


def integers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Floats that are integers: a sum of them over devices is exact in any order."""
    rng = np.random.default_rng(seed)
    return rng.integers(-9, 10, shape).astype(np.float32)


SIZES = {"a": 4, "b": 2}


def make_mesh(kinds: str = "Auto", **sizes: int) -> Mesh:
    """A mesh of axes of `sizes`, or "a" and "b", all of one kind or each of its own."""
    sizes, types = sizes or SIZES, [AxisType[kind] for kind in kinds.split()]
    types *= len(sizes) // len(types)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=tuple(types))


def calls(xs, segments, **more):
    """All cases in one program: compiling takes the time."""
    return [
        case.call(x, s, **more) for case, x, s in zip(CASES, xs, segments, strict=True)
    ]


def with_gradients(f, xs, segments, cts):
    """The values of `f(xs, segments)`, and the gradients for these cotangents."""
    ys, vjp = jax.vjp(lambda xs: f(xs, segments), xs)
    return ys, *vjp(cts)


def put(mesh: Mesh, x, *spec) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def block(shape: tuple[int, ...], spec: P, at: dict[str, int]) -> tuple[slice, ...]:
    """The part of an array that the device at these mesh coordinates holds."""
    index = []
    for size, names in zip(shape, (*spec, *[None] * len(shape)), strict=False):
        first, count = 0, 1
        for name in (names,) if isinstance(names, str) else names or ():
            first, count = first * SIZES[name] + at[name], count * SIZES[name]
        index.append(slice(first * size // count, (first + 1) * size // count))
    return tuple(index)


def by_hand(case: Case, x, segments, ct, x_spec: P, spec: P, out_spec: P, value=None):
    """Values, and the gradient for the cotangent, device by device."""
    zero = None if value is None else 0  # Padding that `value` fills has no gradient.
    y, x_bar, seen = np.zeros_like(ct), np.zeros_like(x), set()
    for a, b in np.ndindex(*SIZES.values()):
        at = {"a": a, "b": b}
        i, j = block(x.shape, x_spec, at), block(segments.shape, spec, at)
        k = block(ct.shape, out_spec, at)
        y[k] = case.expected(x[i], segments[j], value)
        if str((i, j, k)) not in seen:  # Devices that hold all the same are one.
            x_bar[i] += case.expected(ct[k], segments[j], zero)
        seen.add(str((i, j, k)))
    return y, x_bar


_COLLECTIVE = re.compile(
    r"= (.*?) ((?:ragged-)?(?:all-\w+(?:-\w+)*?|collective-\w+|reduce-scatter))"
    r"(?:-start)?\("
)


def bytes_received(compiled: jax.stages.Compiled) -> list[tuple[str, int]]:
    """Name, and bytes received by one device, of each collective of the program."""
    found = []
    for shapes, name in _COLLECTIVE.findall(compiled.as_text() or ""):
        total = 0
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
            total += bits // 8 * int(np.prod([int(n) for n in sizes.split(",") if n]))
        found.append((name, total))
    return found

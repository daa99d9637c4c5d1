"""The rows that can be measured: a case with all its peers, or a point of a curve."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax

from benchmarks import dispatch, forms, rnn
from benchmarks.contenders import (
    ADD,
    OURS,
    Absent,
    Device,
    Operands,
    directions,
    limits,
    ours,
    pasted,
)
from benchmarks.peers import PEERS
from benchmarks.timing import Contender, noise, summary, take_turns
from tests.cases import BENCHMARKS, Case


class Options(NamedTuple):
    device: Device
    seconds: float = 6.0  # What the rounds of one row take, about.
    least_rounds: int = 9


Row = dict[str, Any]
Measure = Callable[[Options], Row]


REGIMES = ("reused", "fresh", "eager")


def measure(
    case: Case,
    options: Options,
    peers: dict[str, Callable[..., Any]] = PEERS,
    regimes: tuple[str, ...] = REGIMES,
) -> Row:
    """Times a case beside the limits and the peers; all of it is checked first."""
    with jax.default_device(options.device):
        o = Operands(case, options.device)
        own = [c for c in limits(o) if c.regime in regimes]
        for contender in ours(o):
            if contender.regime in regimes:
                o.check(contender)  # No row without a right answer of our own.
                own.append(contender)
        others, absent = [], {}
        for name, peer in peers.items():
            try:
                for contender in peer(o):
                    o.check(contender)
                    others.append(contender)
            except Exception as error:  # Whatever a framework raises: said, not timed.
                absent[name] = _reason(error)
        # First without peers: the shorter a round, the less a machine changes in it.
        samples = take_turns(own, options.seconds / 2, options.least_rounds)
        times = summary(samples, _beside)
        contenders = [*own, *others]
        if others:
            all_ = take_turns(contenders, options.seconds / 2, options.least_rounds)
            times += summary(all_, _beside)[len(own) :]
        row = {
            **dict(shape=case.shape, dtype=case.dtype, layout=case.layout),
            **dict(axis=case.axis, segments_per_row=_count(case), bytes=o.host.nbytes),
            "noise": noise(*(samples[key, "reused", "forward"] for key in _TWICE)),
            "times": times,
        }
        if regimes == REGIMES:
            row["absent"] = absent
            for entry, contender in zip(row["times"], contenders, strict=True):
                entry["page_faults"] = _page_faults(contender)
            row["temporary_bytes"] = _temporary(o)
        return row


_TWICE = (ADD, ADD + ", again")


def _beside(key: tuple[str, str, str]) -> dict[str, tuple[str, str, str]]:
    """What a time is divided by, most of it with the same kind of output."""
    name, regime, direction = key
    touched = "reused" if regime in ("reused", "pooled") else "fresh"
    beside = {"x + 1": (ADD, touched, "forward"), "copy": ("copy", "reused", "forward")}
    if name not in (*_TWICE, "copy"):
        beside["ours"] = (OURS, touched, direction)
    if regime == "pooled":  # What a user sees who donates nothing.
        beside["fresh"] = (OURS, "fresh", direction)
    if direction == "vjp":
        beside["forward"] = (name, touched, "forward")
    return beside


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "not installed"
    words = " ".join(str(error).split())
    return words[:160] if isinstance(error, Absent) else f"refuses: {words[:160]}"


def _count(case: Case) -> int:
    return 1 if case.layout == "padded" else case.count


def _page_faults(contender: Contender) -> int:
    """Pages that the system hands out in one call: what tells "pooled" from "fresh"."""
    contender.run(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    contender.run(2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 2


def _temporary(o: Operands) -> dict[str, dict[str, int]]:
    """What the compiled functions allocate beside operands and result."""
    found: dict[str, dict[str, int]] = {}
    for name, function in ((OURS, o.case.call), ("take_along_axis", pasted(o.case))):
        for direction, f in directions(function, o).items():
            compiled = jax.jit(f).lower(o.x, o.s).compile()
            memory: Any = compiled.memory_analysis()
            found.setdefault(name, {})[direction] = memory.temp_size_in_bytes
    return found


# ---- how cost grows, from 16 or 64 kB to 1 GB of float32


def curves() -> Iterator[Case]:
    """Cases called growth-CURVE-VALUE."""
    for t in (4**n for n in range(2, 10)):
        yield Case(f"growth-T-{t}", (16, t, 64))
    for n in (2 * 4**n for n in range(8)):
        yield Case(f"growth-N-{n}", (n, 128, 64))
    for d in (4**n for n in range(9)):
        yield Case(f"growth-D-{d}", (32, 128, d))
    for layout, name in (("packed", "K"), ("ids", "K by ids")):
        for k in (4**n for n in range(1, 9)):
            yield Case(f"growth-{name}-{k}", (1, 64 * k, 64), layout=layout, count=k)
        for k in (16**n for n in range(5)):
            fixed = f"growth-{name} at 64 MB-{k}"
            yield Case(fixed, (1, 262_144, 64), layout=layout, count=k)


def curve_measure(case: Case, options: Options) -> Row:
    """A point needs no peers and no long look."""
    short = options._replace(seconds=options.seconds / 6)
    row = measure(case, short, peers={}, regimes=("reused",))
    _, curve, value = case.name.rsplit("-", 2)
    return row | {"curve": curve, "value": int(value)}


def forms_measure(case: Case, options: Options) -> Row:
    short = options._replace(seconds=options.seconds / 2)
    return measure(case, short, {"forms": forms.contenders}, regimes=("reused",))


def rnn_measure(shape: tuple[int, int, int, int], options: Options) -> Row:
    """A step of a bidirectional network, ours first, and ours once more."""
    with jax.default_device(options.device):
        contenders = rnn.contenders(shape)
        again = dataclasses.replace(contenders[0], name=f"{contenders[0].name}, again")
        samples = take_turns(
            [*contenders, again], 2 * options.seconds, options.least_rounds
        )

    def beside(key: tuple[str, str, str]) -> dict[str, tuple[str, str, str]]:
        names = {"ours": contenders[0].name, "two scans": "two scans"}
        return {label: (name, *key[1:]) for label, name in names.items()}

    return {
        "shape": shape,
        "noise": noise(samples[contenders[0].key], samples[again.key]),
        "times": summary(samples, beside),
    }


# ---- the table of all


def small(case: Case) -> Case:
    """The case at a size that takes no time, for a look whether all still runs."""
    shape = tuple(min(n, 32) for n in case.shape)
    return dataclasses.replace(case, shape=shape, count=min(case.count, 4))


def all_rows(quick: bool = False) -> dict[str, Measure]:
    """Every row by its name, in the order in which they run."""
    cut = small if quick else lambda case: case
    rows: dict[str, Measure] = {
        case.name: partial(measure, cut(case)) for case in BENCHMARKS
    }
    rows["dispatch"] = dispatch.measure
    for name, case in forms.CASES.items():
        rows[name] = partial(forms_measure, cut(case))
    for shape in rnn.QUICK if quick else rnn.SHAPES:
        rows[f"rnn-{'x'.join(map(str, shape))}"] = partial(rnn_measure, shape)
    rows |= {case.name: partial(curve_measure, cut(case)) for case in curves()}
    return rows

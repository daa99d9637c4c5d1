"""The benchmarks run, check what they time, and the pages show what they measured.

No test looks at a time: a busy machine would fail it.
"""

import json
import time

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command, calls, recurrences, report, reversals
from benchmarks.results import Results
from benchmarks.timing import LIMIT, Absent, Contender, Options, measure, ratio
from tests.cases import SMALL

ROWS = ("padded-64x512x8", "calls", "scan linear", "scan packed returns")
ROWS += ("chunk half 32x", "associative packed 8x", "LSTM 8x")


@pytest.mark.peers  # Runs everywhere; with other frameworks there is more to check.
def test_quick_run_writes_a_row_of_each_group(tmp_path, monkeypatch, capsys):
    """`make bench` would stop half way, or print no table for the user's machine."""
    monkeypatch.setattr(calls, "IMPORT", "print(0.5)")
    path, chosen = tmp_path / "results.json", "|".join(ROWS)
    quick = ["--quick", "--json", str(path), "--filter", chosen, "--device", "cpu"]
    assert command.main(quick) == 0
    data = json.loads(path.read_text())
    assert [row["group"] for row in data["rows"].values()] == [
        *("reversal", "calls", "scan", "scan", "chunk", "associative", "bidirectional")
    ]
    reversal, *_, bidirectional = data["rows"].values()
    assert reversal["temporary_bytes"] == 0
    # A row names each peer that is missing here; no peer may be wrong.
    absent = reversal["absent"] | bidirectional["absent"]
    assert not any("computes" in why for why in absent.values())
    for row in data["rows"].values():
        assert all(t["seconds"] > 0 for t in row["times"])
        row["noise"] = 0.0
    assert data["runs"][reversal["run"]]["versions"]["jax"] == jax.__version__
    tables = [report.part(name, "slug", data) for name in report.PARTS]
    for name in ("`padded-64x512x8`", "reverse_sequence, jitted", "`packed 8x2048x64`"):
        assert any(name in table for table in tables)
    scan = report.part("scan", "slug", data)
    assert "| scan_segments | scan_segments, ids | scan_segments, starts |" in scan
    assert "| lax.scan, MB | chunk, MB |" in report.part("chunk", "slug", data)
    assert "[7/7] bidirectional LSTM" in capsys.readouterr().out


def test_wrong_answer_is_not_timed():
    """A wrong peer is reported, and our own wrong answer stops the row."""
    case = SMALL[0]
    wrong = Contender("wrong", lambda n: case.x())
    with pytest.raises(Absent, match="something else"):
        reversals.Operands(case).check(wrong)
    row = reversals.measure_case(case, Options(0, 2), {"peer": lambda o: [wrong]})
    assert row["absent"] == {"peer": "its forward computes something else"}
    assert "wrong" not in {t["name"] for t in row["times"]}
    outputs = [np.ones((2, 3)), np.zeros((2, 3))]
    both = [Contender(str(out[0]), lambda n, out=out: out) for out in outputs]
    with pytest.raises(AssertionError, match="something else"):
        recurrences.check_alike(both, np.ones((2, 3)))


def test_ratio_has_the_base_with_the_same_output():
    """A reused output would be compared with a new one, which costs page faults."""

    def run(n):
        time.sleep(0.004 * n)

    own = [
        Contender(name, run, output, direction)
        for name in ("copy", "ours")
        for output in ("new", "reused")
        for direction in ("forward", "gradient")
        if (name, direction) != ("copy", "gradient")
    ]
    peers = [Contender("peer", run, "pooled")]
    row = measure(Options(0, 2), ["copy", "ours"], own, peers)
    bases = {(t["name"], t["direction"]): set(t["to"]) for t in row["times"]}
    assert bases["copy", "forward"] == {"ours"}
    assert bases["ours", "gradient"] == {"copy"}
    assert bases["peer", "forward"] == {"copy", "ours"}


def test_noise_is_shown_and_left_out():
    """Without the error of a ratio no figure would mean anything."""
    steady, shaky = np.full(16, 1.0), np.tile([1.0, 1.4], 8)
    assert ratio(shaky, steady)["ratio"] == pytest.approx(1.2)
    assert ratio(shaky, steady)["error"] > LIMIT > ratio(steady, steady)["error"]
    rows = {
        name: dict(group="scan", noise=noise, times=[], run="at")
        for name, noise in (("scan a", LIMIT), ("scan b", LIMIT + 0.01))
    }
    data = dict(device="a machine", runs={"at": dict(versions={})}, rows=rows)
    assert list(report.quiet(data, "scan")) == ["a"]
    assert "left out: scan b" in report.machine(data)


def test_results_of_several_runs_are_kept(tmp_path):
    """A second run would lose the first one's rows, or what they were measured with."""
    path = tmp_path / "results.json"
    for at, name in (("then", "first"), ("now", "second"), ("later", "second")):
        results = Results(path)
        results.at = at
        results.add(name, {"noise": 0.0})
    data = json.loads(path.read_text())
    kept = {name: row["run"] for name, row in data["rows"].items()}
    assert kept == {"first": "then", "second": "later"}
    assert set(data["runs"]) == {"then", "later"}


def test_pages_show_the_committed_results():
    """A table, a picture or the README would say what was never measured, or have more
    columns than a phone shows."""
    page, results = report.PAGE.read_text(), report.load()
    assert all(line.count("|") <= 8 for line in page.splitlines())
    assert report.render(page, results) == page
    assert all(f"<!-- {part} -->" in page for part in report.PARTS)
    drawn = {}
    for slug, data in results.items():
        assert report.readme(data) in " ".join(report.README.read_text().split())
        drawn |= report.pictures(slug, data)
    assert {path.name for path in report.DOCS.glob("performance-*")} == set(drawn)
    for name, (_, text) in drawn.items():
        assert (report.DOCS / name).read_text() == text

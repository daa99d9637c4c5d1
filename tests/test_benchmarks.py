"""The benchmarks: that they run, check what they time, and say what they measured.

No test here looks at a time: a loaded machine would fail it.
"""

import json

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command, report, rows
from benchmarks.contenders import Absent, Operands
from benchmarks.results import Results
from benchmarks.timing import Contender, noise, ratio
from tests.cases import SMALL, Case


def test_quick_run_writes_its_rows(tmp_path, capsys):
    """One case with every peer that is here, one point of a curve."""
    path = tmp_path / "results.json"
    arguments = ["--quick", "--json", str(path), "--filter", "^padded-64x512x8|T-16$"]
    assert command.main(arguments) == 0
    data = json.loads(path.read_text())
    case, point = data["rows"].values()
    assert (point["curve"], point["value"]) == ("T", 16)
    assert case["temporary_bytes"]["jax_revseg"] == {"forward": 0, "vjp": 0}
    keys = {(t["name"], t["regime"], t["direction"]) for t in case["times"]}
    for name in ("jax_revseg", "take_along_axis"):
        for direction in ("forward", "vjp"):
            assert {(name, r, direction) for r in ("reused", "fresh")} < keys
    assert ("jax_revseg", "eager", "forward") in keys
    assert all(t["seconds"] > 0 for row in (case, point) for t in row["times"])
    assert data["runs"][case["run"]]["versions"]["jax"] == jax.__version__
    # Here a peer may be missing, and then the row says which; none may be wrong.
    assert not any("computes" in why for why in case["absent"].values())
    assert "jax_revseg" in capsys.readouterr().out


@pytest.mark.peers  # Runs everywhere, and there with more to check.
@pytest.mark.parametrize("case", rows.BENCHMARKS, ids=lambda case: case.name)
def test_every_case_is_answered_rightly_by_all_that_take_part(case):
    """A peer that computes something else would be timed for nothing."""
    o = Operands(rows.small(case), jax.devices()[0])
    answered = set()
    for name, peer in rows.PEERS.items():
        try:
            for contender in peer(o):
                o.check(contender)
                answered.add(name)
        except Exception as error:
            assert "computes" not in str(error), (name, error)
    assert {"take_along_axis", "NumPy"} <= answered


def test_wrong_answer_is_not_timed():
    """Neither a peer's, which is reported, nor our own, which stops the row."""
    o = Operands(SMALL[0], jax.devices()[0])
    wrong = Contender("wrong", lambda n: o.host)
    with pytest.raises(Absent, match="something else"):
        o.check(wrong)
    row = rows.measure(
        SMALL[0], rows.Options(o.device, 0, 2), {"peer": lambda o: [wrong]}
    )
    assert row["absent"] == {"peer": "its forward computes something else"}
    assert "wrong" not in {t["name"] for t in row["times"]}


def test_noise_is_told():
    """Were every row quiet, no figure would mean anything."""
    steady = np.full(16, 1.0)
    assert noise(steady, steady * 1.01)["quiet"]
    assert not noise(steady, steady * 1.1)["quiet"]
    shaky = np.tile([1.0, 1.4], 8)
    assert not noise(steady, shaky)["quiet"]
    assert ratio(shaky, steady)["ratio"] == pytest.approx(1.2)


def test_resume_leaves_out_quiet_rows_of_this_source_alone(tmp_path):
    """A row of other source, or a noisy one, has to be measured again."""
    results = Results(tmp_path / "results.json", jax.devices()[0])
    results.add("quiet", {"noise": {"quiet": True}})
    results.add("noisy", {"noise": {"quiet": False}})
    again = Results(results.path, jax.devices()[0])
    assert again.has("quiet") and not again.has("noisy") and not again.has("other")
    again.run["source"] = "other"
    assert not again.has("quiet")


def test_page_says_what_the_results_say():
    """The tables of the page are the committed results, and nothing else."""
    page = report.PAGE.read_text()
    assert report.render(page, report.load()) == page
    for part in report.PARTS:
        assert f"<!-- {part} -->" in page


def test_ids_of_long_rows():
    """A curve goes to a segment axis of 4 million with 65,536 segments."""
    case = next(c for c in rows.curves() if c.name == "growth-K by ids-65536")
    ids = Case(case.name, (1, case.size), layout="ids", count=case.count).segments()
    assert ids.shape == (1, case.size) and ids.max() > 60_000

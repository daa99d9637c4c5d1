"""The self-check: right when all is right, and above all not when something is not."""

import json
import subprocess
import sys

import jax
import pytest

from jax_revseg import __main__ as self_check, _compat, reverse_segments_p

# Replaces the lowering before the self-check runs: in a process of its own, since no
# call takes a registered lowering back.
WRONG_LOWERING = """
import sys
from jax_revseg import _compat, reverse_segments_p
from jax_revseg.__main__ import main

rule = _compat.mlir.lower_fun(lambda x, segments, **_: {body}, multiple_results=False)
_compat.mlir.register_lowering(reverse_segments_p, rule, platform="cpu")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def fresh_caches():
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_quick_json(capsys):
    """The report that issues ask for: every encoding, values and gradients."""
    assert self_check.main(["--quick", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["summary"].startswith("All is right")
    assert {"jax", "jaxlib", "jax_revseg"} < result["versions"].keys()
    assert {check["encoding"] for check in result["checks"]} == {
        case.name for case in self_check.CASES
    }
    for check in result["checks"]:
        assert check["forward"] is True and check["gradient"] is True, check


def test_text_ends_with_the_verdict(capsys, monkeypatch):
    """With sizes cut, the timed part runs too, and each ratio is one of two times."""
    time_case = self_check.time_case
    monkeypatch.setattr(
        self_check,
        "time_case",
        lambda shape, *rest: time_case((4, 32, *shape[2:]), *rest),
    )
    monkeypatch.setattr(self_check, "CASES", self_check.CASES[:1])
    assert self_check.main([]) == 0
    text = capsys.readouterr().out
    assert "not run" not in text and "to a copy" in text
    assert text.splitlines()[-1].startswith("All is right: ")
    timing = time_case((4, 32, 8), 4, jax.devices()[0], None)
    assert timing["ratio"] > 0 and timing["ms"] > 0 and timing["copy_ms"] > 0


@pytest.mark.parametrize(
    ("body", "says"),
    [("x", "WRONG"), ("1 / 0", "ZeroDivisionError")],
    ids=["identity", "a lowering that raises"],
)
def test_wrong_lowering_fails(body, says):
    """Were the exit status 0 here, no report from other hardware would mean much."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG_LOWERING.format(body=body), "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("SOMETHING IS WRONG: 12 of 12 checks"), last
    assert says in done.stdout


def test_wrong_gradient_fails(monkeypatch, capsys, fresh_caches):
    """Values alone may be right while the gradient is not."""
    monkeypatch.setitem(
        _compat.ad.primitive_transposes,
        reverse_segments_p,
        lambda ct, x, segments, **_: [ct, None],
    )
    assert self_check.main(["--quick", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    for check in result["checks"]:
        assert check["forward"] is True and check["gradient"] is False, check

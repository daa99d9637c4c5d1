"""The self-check: right when all is right, and above all not when something is not."""

import json
import subprocess
import sys

import jax
import pytest

from jax_revseg import __main__ as self_check

# Each fault in a process of its own, since JAX caches what it has traced and compiled.
FAULT = """
import sys
from jax_revseg import _compat, reverse_segments_p
from jax_revseg.__main__ import main

def lower(fun):
    rule = _compat.mlir.lower_fun(fun, multiple_results=False)
    _compat.mlir.register_lowering(reverse_segments_p, rule, platform="cpu")

{fault}
sys.exit(main(["--quick", "--json"]))
"""


def test_quick_json(capsys):
    """Also under debug_nans: the NaNs are there on purpose."""
    with jax.debug_nans(True):
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
    "fault, forward, error",
    (
        ("lower(lambda x, segments, **_: x)", False, None),
        ("lower(lambda x, segments, **_: 1 / 0)", False, "ZeroDivisionError"),
        (
            "_compat.ad.primitive_transposes[reverse_segments_p] = "
            "lambda ct, *_, **params: [ct, None]",
            True,
            None,
        ),
    ),
    ids=("wrong values", "a lowering that raises", "wrong gradient"),
)
def test_a_fault_fails_every_check(fault, forward, error):
    """Fails if a wrong result passes the self-check."""
    done = subprocess.run(
        [sys.executable, "-c", FAULT.format(fault=fault)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["summary"].startswith("SOMETHING IS WRONG: 12 of 12 checks")
    for check in result["checks"]:
        assert check["forward"] is forward, check
        assert not check["gradient"], check
        assert (error or "") in check.get("error", ""), check

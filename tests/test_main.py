"""The self-check: right when all is right, and above all not when something is not."""

import json
import subprocess
import sys

import jax

from jax_revseg import __main__ as self_check

# In a process of its own, since JAX caches what it has traced and compiled.
FAULTS = """
import contextlib, io, json, sys
import jax
from jax_revseg import _compat, reverse_segments_p
from jax_revseg import __main__ as self_check

def lower(fun):
    rule = _compat.mlir.lower_fun(fun, multiple_results=False)
    _compat.mlir.register_lowering(reverse_segments_p, rule, platform="cpu")

def report():
    jax.clear_caches()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = self_check.main(["--quick", "--json"])
    return status, json.loads(out.getvalue())

self_check.CASES = self_check.CASES[::3]  # One of each kind of lengths.
transposes = _compat.ad.primitive_transposes
right = transposes[reverse_segments_p]
transposes[reverse_segments_p] = lambda ct, *_, **params: [ct, None]
reports = {"wrong gradient": report()}
transposes[reverse_segments_p] = right
lower(lambda x, segments, **_: x)
reports["wrong values"] = report()
lower(lambda x, segments, **_: 1 / 0)
reports["a lowering that raises"] = report()
print(json.dumps(reports))
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
    small = [(4, 32, 8, 1), (4, 32, 8, 4)]  # On a CPU they are taken as they are.
    monkeypatch.setattr(self_check, "SIZES", small)
    monkeypatch.setattr(self_check, "CASES", self_check.CASES[:1])
    assert self_check.main([]) == 0
    text = capsys.readouterr().out
    assert text.count(" to a copy") == len(small) * text.count("\ncpu (")
    assert text.splitlines()[-1].startswith("All is right: ")


def test_a_fault_fails_every_check():
    """Fails if a wrong result passes the self-check."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 3
    for fault, (status, result) in reports.items():
        assert status == 1, fault
        assert result["summary"].startswith("SOMETHING IS WRONG: 4 of 4 checks")
        error = "ZeroDivisionError" if fault == "a lowering that raises" else ""
        for check in result["checks"]:
            assert check["forward"] is (fault == "wrong gradient"), check
            assert not check["gradient"], check
            assert error in check.get("error", ""), check

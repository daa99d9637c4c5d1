"""A strict type checker accepts a user's program, and that program runs."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PROGRAM = Path(__file__).parent / "typing_program.py"


PYRIGHT = shutil.which("pyright", path=Path(sys.executable).parent)


def test_program_runs():
    """Traced, since compiling each call by itself takes seconds."""
    jax.eval_shape(lambda: runpy.run_path(str(PROGRAM)) and None)


@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not beside this Python")
@pytest.mark.parametrize("wrong", [None, 'reverse_sequence(x, "lengths", axes=0)\n'])
def test_strict(tmp_path, wrong):
    """Fails if a strict user gets an error, or if pyright overlooks a wrong call."""
    program = tmp_path / PROGRAM.name
    program.write_text("# pyright: strict\n" + PROGRAM.read_text() + (wrong or ""))
    command = [PYRIGHT, "--pythonpath", sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr

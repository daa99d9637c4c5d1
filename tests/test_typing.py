"""A strict type checker accepts a user's program, and that program runs."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

PROGRAM = Path(__file__).parent / "typing_program.py"


def pyright(*arguments):
    found = shutil.which("pyright", path=Path(sys.executable).parent)
    if found is None:
        pytest.skip("pyright is not installed beside this Python")
    return subprocess.run(
        [found, "--pythonpath", sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_program_runs():
    """Traced, since compiling each call by itself takes seconds."""
    jax.eval_shape(lambda: runpy.run_path(str(PROGRAM)) and None)


@pytest.mark.parametrize("wrong", [None, 'reverse_sequence(x, "lengths", axes=0)\n'])
def test_strict(tmp_path, wrong):
    """Fails if a strict user gets an error, or if pyright overlooks a wrong call."""
    program = tmp_path / PROGRAM.name
    program.write_text("# pyright: strict\n" + PROGRAM.read_text() + (wrong or ""))
    done = pyright(program)
    assert done.returncode == (1 if wrong else 0), done.stdout + done.stderr

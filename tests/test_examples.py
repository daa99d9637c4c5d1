"""Every example explains itself; `make examples` runs them all."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def test_are_short_and_say_what_they_do():
    examples = [*FOLDER.glob("[!_]*.py")]
    assert examples
    for text in (path.read_text() for path in examples):
        assert len(text.splitlines()) < 150
        assert (ast.get_docstring(ast.parse(text)) or "").strip()
        assert "argparse" in text or "options(__doc__)" in text  # That is, --help.


@pytest.mark.peers  # The environment of `make peers` has what the example imports.
def test_download_that_fails_says_what_to_do(tmp_path):
    """Fails if the user sees a traceback. Here pip finds no package at all."""
    for module in ("optax", "tqdm"):
        pytest.importorskip(module)
    code = (
        "import os, sys, pathlib; from _japanese_vowels import fetch; "
        "os.environ.update(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull); "
        "os.environ.pop('PIP_FIND_LINKS', None); "
        "fetch(pathlib.Path(sys.argv[1]))"
    )

    def fetch():
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=FOLDER,
            env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = fetch()
    assert done.returncode == 1
    assert "Downloading aeon==1.6.0 from PyPI (6.4 MB, once)" in done.stdout
    assert "Could not download the data, aeon==1.6.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--data FOLDER" in done.stderr

    (tmp_path / "aeon-1.6.0-py3-none-any.whl").write_bytes(b"something else")
    done = fetch()
    assert done.returncode == 1 and "SHA-256" in done.stderr

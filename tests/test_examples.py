"""Every example runs to its end, in its quick mode, and explains itself."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def run(name, *arguments):
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(
        [sys.executable, f"{name}.py", *arguments],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def needs(name):
    """The modules outside the project that an example imports, and are missing."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    for module in sorted(found):
        if module.startswith("_") and (FOLDER / f"{module}.py").exists():
            yield from needs(module)
        elif importlib.util.find_spec(module) is None:
            yield module


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name):
    """An example that stops with a traceback, or with results that differ."""
    if missing := sorted(set(needs(name))):
        pytest.skip(f"{name} needs {', '.join(missing)}: install the examples extra")
    done = run(name, "--quick")
    if done.returncode and done.stderr.startswith("Could not download"):
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 3, done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short_and_says_what_it_does(name):
    """Examples are read more than they are run."""
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 150
    assert (ast.get_docstring(ast.parse(text)) or "").strip()
    assert "argparse" in text or "options(__doc__)" in text  # That is, --help.


def test_download_that_fails_says_what_to_do(tmp_path):
    """A traceback where a sentence would do: pip here finds no package at all."""
    if missing := sorted(set(needs("japanese_vowels"))):
        pytest.skip(f"japanese_vowels needs {', '.join(missing)}")
    code = (
        "import os, sys, pathlib; from _japanese_vowels import fetch; "
        "os.environ.update(PIP_NO_INDEX='1', PIP_CONFIG_FILE=os.devnull); "
        "os.environ.pop('PIP_FIND_LINKS', None); "
        "fetch(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Downloading aeon==1.6.0 from PyPI (6.4 MB, once)" in done.stdout
    assert "Could not download the data, aeon==1.6.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert "--data FOLDER" in done.stderr

    (tmp_path / "aeon-1.6.0-py3-none-any.whl").write_bytes(b"something else")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=FOLDER,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "SHA-256" in done.stderr

"""What is said of JAX's versions, and the one file that may look at them."""

import ast
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from jax_revseg import _compat

ROOT = pathlib.Path(__file__).parents[1]
PRIVATE = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")


def imports(path):
    """Every name that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_one_file_knows_the_versions():
    """Fails on a private import, or a branch on the version, outside _compat.py."""
    for path in (ROOT / "jax_revseg").glob("*.py"):
        if path.name != "_compat.py":
            text = path.read_text()
            names = [*imports(path), *re.findall(r"[\w.]+\.\w+", text)]
            assert not [name for name in names if name.startswith(PRIVATE)], path
            assert not re.search(r"JAX_VERSION|hasattr\((jax|lax)", text), path


def test_needs_jax_alone():
    """Fails if the package imports something that is not installed with jax."""
    known = {"jax", "jax_revseg", "numpy", *sys.stdlib_module_names}
    for path in (ROOT / "jax_revseg").glob("*.py"):
        more = {"jax2onnx", "onnx_ir"} if path.name == "onnx.py" else set()
        assert {name.partition(".")[0] for name in imports(path)} <= known | more, path


def test_every_branch_says_when_it_goes():
    """Fails if a branch of _compat.py outlives the last version that needs it."""
    lines = (ROOT / "jax_revseg" / "_compat.py").read_text().splitlines()
    branch = re.compile(r"\bif .*(VERSION|hasattr)")
    branches = [i for i, line in enumerate(lines) if branch.search(line)]
    assert branches
    for i in branches:
        near = "\n".join(lines[i - 1 : i + 3])
        assert re.search(r"# From 0\.\d+\.\d+ on", near), lines[i]


def test_every_place_names_the_same_oldest_version():
    """Fails if the oldest version that is promised is not the one that is tested."""
    read = lambda name: (ROOT / name).read_text()  # noqa: E731
    (oldest,) = set(re.findall(r"jax(?:\[\w+\])?>=([\d.]+)", read("pyproject.toml")))
    assert re.search(rf"^VERSIONS := {re.escape(oldest)} ", read("Makefile"), re.M)
    assert f'jax: ["{oldest}",' in read(".github/workflows/ci.yml")
    assert oldest in read("README.md")
    assert (ROOT / f"tests/fixtures/exported-by-jax-{oldest}.bin").exists()


def test_this_jax_is_supported():
    """Fails if the tests run on a JAX that the package does not promise."""
    assert jax.__version_info__[:3] >= (0, 7, 2)
    assert _compat.JAX_VERSION[:2] == tuple(map(int, jax.__version__.split(".")[:2]))


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="not a checkout")
def test_missing_python_does_not_pass_for_run(tmp_path):
    """Fails if a version that no Python here can run seems to pass."""
    run = subprocess.run(
        [ROOT / ".ci" / "find-python", "3.99"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert run.returncode != 0
    assert "NOT RUN: no Python 3.99" in run.stderr

"""Every example that a reader sees is run: README, site, docstrings.

Notebook pages run when the site is built (`make docs`). Here run the blocks of all
other pages, one page after the other, and those of each module.
"""

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import jax_revseg

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PEERS = {
    "migration.md": ("tensorflow", "onnx", "onnxruntime", "torch", "flax"),
    "rnn.md": ("flax", "equinox", "haiku", "torch", "tensorflow", "keras"),
}
FENCE = re.compile(r"^ *(?:```|:::)(\S*)", re.MULTILINE)


def is_notebook(page):
    return page.read_text().startswith("---\nfile_format: mystnb")


def run(sybil, path, at_least):
    examples = list(sybil.parse(path))
    assert len(examples) >= at_least, f"{path} has {len(examples)} examples"
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.name, marks=[pytest.mark.peers] * (page.name in PEERS)
        )
        for page in PAGES
        if not is_notebook(page) and "```python" in page.read_text()
    ],
)
def test_page(page):
    """Each block of Python gives what the page says that it gives."""
    for module in PEERS.get(page.name, ()):
        pytest.importorskip(module)
    blocks = page.read_text().count("```python")
    run(Sybil([PythonCodeBlockParser()]), page, at_least=blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes(page):
    """A block in another language, or of a notebook elsewhere, would never be run."""
    opened = FENCE.findall(page.read_text())[::2]
    code = {"{code-cell}"} if is_notebook(page) else {"python"}
    assert set(opened) <= code | {
        "text",
        "bash",
        "{toctree}",
        "{include}",
        "{eval-rst}",
    }


def test_pictures_are_up_to_date(monkeypatch):
    """A picture shows what the library did before a change, or older results."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import pictures

    drawn = pictures.draw()
    assert {path.name for path in pictures.IMAGES.glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        same = (pictures.IMAGES / name).read_text() == svg
        assert same, f"docs/images/{name} is out of date: run `make pictures`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_of_a_page_are_committed(page):
    """A reader of the Markdown in the repository would see no picture."""
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
        picture = (page.parent / target).resolve()
        assert picture.is_file() and "_build" not in picture.parts, target


def test_make_targets_exist():
    """A command that the README or the contributor's page names is one of make's."""
    targets = set(re.findall(r"^([\w-]+)%?:", (ROOT / "Makefile").read_text(), re.M))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.M):
            assert name in targets, f"{page.name}: make {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_revseg").glob("*.py")), ids=lambda path: path.name
)
def test_docstrings(path):
    run(
        Sybil([DocTestParser()], document_types={".py": PythonDocStringDocument}),
        path,
        at_least=0,
    )


# The primitive is an instance of JAX's class: the module's docstring speaks of it.
@pytest.mark.parametrize("name", sorted({*jax_revseg.__all__} - {"reverse_segments_p"}))
def test_every_public_docstring(name):
    """What an editor or `help` shows has arguments, result, padding, and an example."""
    public = getattr(jax_revseg, name)
    for part in ("Args:", "Returns:", "Example", ">>> "):
        assert part in public.__doc__, f"{name}: {part}"
    assert "padding" in public.__doc__ or "segment" in public.__doc__


def test_help_reads_like_a_page():
    """`help(jax_revseg)` names every public function."""
    for name in jax_revseg.__all__:
        assert name in (jax_revseg.__doc__ or ""), name

"""Every example that a reader sees is run: README, pages, docstrings."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import jax_revseg

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = sorted({*PAGES, *ROOT.glob("*.md")})
PEERS = {
    "migration.md": "tensorflow keras onnxruntime jax2onnx torch flax".split(),
    "rnn.md": "flax equinox haiku torch tensorflow keras".split(),
}
PUBLIC = sorted({*jax_revseg.__all__} - {"reverse_segments_p"})
FENCE = re.compile(r"^ *(?:```|:::)(\S*)", re.MULTILINE)


def links(markdown):
    """The targets of links, outside code, that are no address."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    return re.findall(r"\]\((?!https?://)([^)]+)\)", prose)


def run(path, parser, **kinds):
    """Runs the examples of a file, and returns their number."""
    examples = list(Sybil([parser], **kinds).parse(path))
    for example in examples:
        example.evaluate()
    return len(examples)


def marked(page):
    mark = pytest.mark.peers if page.name in PEERS else pytest.mark.docs
    return pytest.param(page, id=page.name, marks=mark)


@pytest.mark.parametrize(
    "page", [marked(page) for page in PAGES if "```python" in page.read_text()]
)
@pytest.mark.filterwarnings("ignore:'.value' access:DeprecationWarning")  # jax2onnx's.
def test_page(page):
    """Each block of Python gives what the page says that it gives."""
    for module in PEERS.get(page.name, ()):
        pytest.importorskip(module)
    parser = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS)
    assert run(page, parser) >= page.read_text().count("```python")


def test_no_block_escapes():
    """A block in another language would never be run."""
    for page in PAGES:
        opened = {*FENCE.findall(page.read_text())[::2]}
        assert opened <= {"python", "text", "bash", "{toctree}"}, page


def test_pictures_are_up_to_date(monkeypatch):
    """A picture shows what the library did before a change, or older results."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    import pictures

    drawn = pictures.draw()
    assert {path.name for path in pictures.IMAGES.glob("*.svg")} == set(drawn)
    for name, svg in drawn.items():
        same = (pictures.IMAGES / name).read_text() == svg
        assert same, f"docs/images/{name} is out of date: run `make pictures`"


def test_links_stay_in_the_repository():
    """A link to a file that is not committed, or to a heading that is not there."""
    for page, target in [(p, link) for p in TEXTS for link in links(p.read_text())]:
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and "_build" not in file.parts, target
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text().lower(), re.M)
            slugs = [re.sub(r"[^\w -]", "", t).replace(" ", "-") for t in titles]
            assert heading in slugs, target


@pytest.mark.parametrize("repository", ["", "https://example.org/owner/name"])
def test_links_work_on_a_package_index(repository):
    """An index shows the README without the files beside it."""
    metadata = ProjectMetadata(str(ROOT), PluginManager())
    metadata.hatch.metadata.hook_config["custom"]["repository"] = repository
    for target in links(metadata.core.readme):
        assert target.startswith("#"), target
    assert all(url.startswith(repository) for url in metadata.core.urls.values())
    assert bool(metadata.core.urls) == bool(repository)


def test_the_address_stands_in_one_place():
    """Addresses of this project that a maintainer would have to find and change."""
    address = re.compile(r"https?://[\w./-]*jax[-_]revseg")
    for page in [*TEXTS, *ROOT.glob("[!.]*.*"), *ROOT.glob(".github/**/*.*")]:
        assert not address.search(page.read_text()), page


def test_the_map_of_the_code_is_true():
    """A file that the map lacks, or one that imports a file above it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.findall(r"^\| `(\w+)\.py` \|", text, re.M)
    for number, name in enumerate(order):
        source = (ROOT / "jax_revseg" / f"{name}.py").read_text()
        used = set(re.findall(r"(?:from jax_revseg\.| import )(_[a-z]\w*)", source))
        assert not used & set(order[:number]), name
    aside = {n for n in ("_reference", "__main__", "onnx") if f"`{n}.py`" in text}
    assert {path.stem for path in ROOT.glob("jax_revseg/*.py")} <= {*order} | aside


def test_make_targets_exist():
    """A command that a page names is one of make's."""
    targets = set(re.findall(r"^([\w-]+)%?:", (ROOT / "Makefile").read_text(), re.M))
    for page in TEXTS:
        for name in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.M):
            assert name in targets, f"{page.name}: make {name}"


@pytest.mark.docs
@pytest.mark.parametrize(
    "path", sorted((ROOT / "jax_revseg").glob("*.py")), ids=lambda path: path.name
)
def test_docstrings(path):
    run(path, DocTestParser(), document_types={".py": PythonDocStringDocument})


# The primitive is an instance of JAX's class: the module's docstring speaks of it.
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_docstring(name):
    """What an editor or `help` shows has arguments, result, padding, and an example;
    the page of the interface and `help(jax_revseg)` name every function."""
    text = inspect.getdoc(getattr(jax_revseg, name))
    for part in ("Args:", "Returns:", "Example", ">>> "):
        assert part in text
    assert "padding" in text or "segment" in text
    table = (DOCS / "api.md").read_text()
    listed = dict(re.findall(r"\| `(\w+).*?` \| (.*) \|", table))
    assert listed[name] == text.split("\n")[0]
    assert name in jax_revseg.__doc__

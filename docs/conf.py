"""The site: `make docs`."""

import os
import re
import tomllib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax_revseg  # noqa: E402

ROOT = Path(__file__).parent.parent

project = "jax_revseg"
author = "The jax_revseg developers"
copyright = "The jax_revseg developers"
version = release = jax_revseg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "code"  # Docstrings write `x`, as Markdown does.

myst_heading_anchors = 3

maximum_signature_line_length = 60
autodoc_type_aliases = {
    name: name for name in ("ArrayLike", "AxisName", "BatchAxis", "Integers")
}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Nothing to link to without an inventory from the network at each build.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|numpy|collections|typing)\..*"),
    ("py:.*", r"ArrayLike|AxisName|BatchAxis|Integers|Any|Callable"),
    ("py:.*", r"jax_revseg\._.*"),
]

# `sphinx -b linkcheck` checks the site's own links and asks nobody else.
linkcheck_ignore = [r"https?://.*"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jax_revseg {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
if repository := hatch["metadata"]["hooks"]["custom"]["repository"]:
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }

# The Markdown of these two pages is for readers of the repository. The site adds the
# docstrings to the one, in the order of its tables, and shows the changelog itself as
# the other.
DOCSTRINGS = """

```{{eval-rst}}
.. currentmodule:: jax_revseg

{}
```
"""
FUNCTIONS = [f for f in jax_revseg.__all__ if not f.endswith("_p")]
CALL = re.compile(rf"`(({'|'.join(FUNCTIONS)})(\(.*?\))?)`")


def complete(app, name, source):
    if name == "api":
        listed = [call[1] for call in CALL.findall(source[0])]
        each = "\n\n".join(f".. autofunction:: {f}" for f in dict.fromkeys(listed))
        linked = CALL.sub(r"{py:func}`\1 <jax_revseg.\2>`", source[0])
        source[0] = linked + DOCSTRINGS.format(each)
    elif name == "changelog":
        source[0] = (ROOT / "CHANGELOG.md").read_text()


def link(app, what, name, obj, options, lines):
    """Links the other functions that a docstring names."""

    def role(call):
        other = call[2] != name.rpartition(".")[2]
        return f":py:func:`{call[1]} <jax_revseg.{call[2]}>`" if other else call[0]

    lines[:] = [CALL.sub(role, line) for line in lines]


def plain_aliases(app, what, name, obj, options, signature, returns):
    """`ArrayLike | None`, which Sphinx prints with its own class around the alias."""
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature or ""), returns


def setup(app):
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", link)
    app.connect("autodoc-process-signature", plain_aliases)

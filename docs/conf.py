"""The site: `make docs`. Notebook pages are executed at each build."""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # For the notebooks' processes as well.

import jax_revseg  # noqa: E402

project = "jax_revseg"
author = "The jax_revseg developers"
copyright = "The jax_revseg developers"
version = release = jax_revseg.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = True
default_role = "code"  # Docstrings write `x`, as Markdown does.

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

maximum_signature_line_length = 60
autodoc_type_aliases = {
    name: name
    for name in ("ArrayLike", "AxisName", "BatchAxis", "Implementation", "Integers")
}
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Nothing to link to without an inventory from the network at each build.
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|numpy|collections|typing)\..*"),
    ("py:.*", r"ArrayLike|AxisName|BatchAxis|Implementation|Integers|Any|Callable"),
]

# Only links within the project are checked: others may be down when nothing is wrong.
linkcheck_ignore = [r"https?://"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jax_revseg {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "source_repository": "https://github.com/jax-revseg/jax-revseg/",
    "source_branch": "main",
    "source_directory": "docs/",
}
# `sphinx -b linkcheck` looks at the site's own links and asks nobody else.
linkcheck_ignore = [r"https?://.*"]


def plain_aliases(app, what, name, obj, options, signature, returns):
    """`ArrayLike | None`, which Sphinx prints with its own class around the alias."""
    return re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature or ""), returns


def setup(app):
    app.connect("autodoc-process-signature", plain_aliases)

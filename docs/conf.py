"""How Sphinx builds the site: `sphinx-build -W docs docs/_build`.

Notebooks are shown as the slow tests have executed them, where `EFOPT_NOTEBOOKS` names
the folder; else they are executed here, and kept in a cache.
"""

import os
import sys
from pathlib import Path

# Before jax is imported, by notebooks too: eight virtual devices on a small machine.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent), str(DOCS.parent / "tests")]

import efopt  # noqa: E402

project = "efopt"
author = "The efopt authors"
project_copyright = author
version = release = efopt.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "entries",
    "generated",
]
exclude_patterns = ["_build", "_ext", "pictures"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Docstrings say types in signatures, and shapes in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_display_short_literal_types = True

# Every reference to a name of efopt must lead somewhere.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!efopt\b).*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off" if "EFOPT_NOTEBOOKS" in os.environ else "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

html_theme = "furo"
html_title = "efopt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5c8a",
        "color-brand-content": "#0b5c8a",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4ee",
        "color-brand-content": "#7cc4ee",
    },
}
copybutton_exclude = ".linenos, .gp, .go"

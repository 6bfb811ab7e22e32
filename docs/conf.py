"""Sphinx: the pages of this folder and an API reference made from the docstrings. `make docs` builds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastseg.version import __version__

project, author, release = "fastseg", "the fastseg developers", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastseg {release}"
templates_path: list[str] = []

myst_heading_anchors = 3  # links to headings, as on code hosts
suppress_warnings = ["myst.header"]  # pages may begin a table's section at the second level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_custom_sections = ["Shape", "Source", ("Attributes", "params_style")]
napoleon_use_rtype = False

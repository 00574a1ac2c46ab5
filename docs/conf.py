"""Sphinx's configuration: the pages as they stand, and the API from the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "GigaPath on Triton"
author = "the contributors"
copyright = "the contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"
html_theme = "furo"
html_title = project
myst_heading_anchors = 3
# `[text](../deploy/x)` leads out of docs: to the file in the repository, which the site offers for download.
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
napoleon_use_rtype = False

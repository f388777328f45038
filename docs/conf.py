"""Configuration of Sphinx; `ci/docs` builds the site."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for trio_runner, and for docs._ext

import trio_runner  # noqa: E402

project = "trio-runner"
author = "trio-runner founders"
copyright = "trio-runner founders"
version = release = trio_runner.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "docs._ext.directives"]
exclude_patterns = ["_ext"]
smartquotes = False  # they would turn the dashes of options into one long dash
default_role = "code"  # docstrings put names in single backticks, as Markdown does

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"trio-runner {version}"
html_copy_source = False
html_show_sphinx = False

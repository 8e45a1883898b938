"""The documentation site: `make site`. A warning is an error; links between pages are checked as it is built."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "pytracker"
html_title = "pytracker"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"

myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
exclude_patterns = ["pictures"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# Trainers and tools need not be installed to build the site.
autodoc_mock_imports = ["transformers", "accelerate", "lightning", "pytorch_lightning", "keras"]
napoleon_use_ivar = True

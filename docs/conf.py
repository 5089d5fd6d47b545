"""How Sphinx builds the documentation: ``make docs``."""

import mrconvnext

project = "mrconvnext"
author = "The mrconvnext authors"
copyright = "2026, The mrconvnext authors"
release = version = mrconvnext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "outputs"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # of commands with … in the place of what the reader knows

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
default_role = "code"  # docstrings write `name`

html_theme = "furo"
html_title = "mrconvnext"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/OWNER/mrconvnext",
    "source_branch": "main",
    "source_directory": "docs/",
}

"""Sphinx's settings. `make docs` builds the site into build/docs, runs the gallery and takes warnings for errors."""

import natgrad

project = "natgrad"
author = copyright = "the natgrad developers"
version = release = natgrad.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["gallery/*.ipynb", "gallery/*.py"]

html_theme = "furo"
html_title = f"natgrad {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]

# Headings that other pages link to, formulas as GitHub shows them.
myst_enable_extensions = ["dollarmath", "attrs_block", "colon_fence"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they stand in the signatures' source; what matters, shapes and units, is in the text
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": ["../examples/gallery"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__\.py",
    "abort_on_example_error": True,
    "copyfile_regex": r"GALLERY_HEADER\.rst",
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "within_subsection_order": "ExampleTitleSortKey",
}

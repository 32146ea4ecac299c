"""Sphinx configuration: `python -m sphinx -W -b html docs build/docs`."""

import re

from docutils import nodes

project = "hydraopt_jax"
author = "The hydraopt_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
html_theme = "sphinx_book_theme"
html_title = "hydraopt_jax"
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# the READMEs of experiments are included: their links to files are no documents
suppress_warnings = ["myst.xref_missing", "myst.header"]
napoleon_use_ivar = True


def to_literals(app, what, name, obj, options, lines):
    """Docstrings quote code in single backticks, as Markdown does."""
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    # the end of a literal is no letter
    lines[:] = re.sub(r"(?<=\w)``(?=\w)", r"``\\ ", text).split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """Fields of a NamedTuple are described with the tuple."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def keep_schemes(app, doctree):
    """Our SVGs have a dark scheme of their own: the theme leaves images of this class alone."""
    for image in doctree.findall(nodes.image):
        if image["uri"].endswith(".svg"):
            image["classes"].append("dark-light")


def setup(app):
    app.connect("doctree-read", keep_schemes)
    # before napoleon, which takes a colon outside quotes for the end of a type
    app.connect("autodoc-process-docstring", to_literals, priority=400)
    app.connect("autodoc-skip-member", skip_fields)

"""The site's configuration: ``make docs`` builds README, guides and API pages into build/site.

Sphinx, because much of the API is made when it is imported (the Nipype interfaces' inputs and
outputs): a generator that reads the source alone would not see it. Nipype's own extension turns
numpydoc and traits into sections; MyST reads the Markdown pages as they stand.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from qsmpipe import __version__

project, author, version = "qsmpipe", "The qsmpipe developers", __version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "nipype.sphinxext.apidoc",
]

# The source is the whole repository: the guides link to README, changelog and examples.
include_patterns = ["*.md", "docs/**", "bids_examples/README.md"]
exclude_patterns = ["docs/_templates"]
root_doc = "README"
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}
html_theme = "furo"
html_title = f"qsmpipe {version}"
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
# Types are prose, such as "(X, Y, Z) tensor": no names to look up.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Inputs", "params_style"),
    ("Mandatory Inputs", "params_style"),
    ("Optional Inputs", "params_style"),
    ("Outputs", "params_style"),
]

API = [
    "chain", "phase", "masks", "unwrap", "field", "relaxation", "swi", "background", "inversion",
    "cosmos", "reference", "uncertainty", "simulate", "measures",
]  # fmt: skip
"""Pages of docs/api, in the order of processing."""

PROJECT = ["CHANGELOG", "CONTRIBUTING", "docs/releasing"]
"""Pages for who works on qsmpipe itself."""


def linked(docname: str, text: str) -> list[str]:
    """Markdown pages that a page links to, in its order."""
    folder = posixpath.dirname(docname)
    links = re.findall(r"\]\(([\w./-]+)\.md[)#]", text)
    return [*dict.fromkeys(posixpath.normpath(posixpath.join(folder, link)) for link in links)]


def contents() -> dict[str, list[str]]:
    """Give every page its place: by caption, in order."""
    root = Path(__file__).parents[1]
    index = "docs/index"
    guides = linked(index, (root / f"{index}.md").read_text())
    elsewhere = {root_doc, "docs/api", *PROJECT}
    return {
        "Guides": [index, *(page for page in guides if page not in elsewhere)],
        "API": ["docs/api", *(f"docs/api/{page}" for page in API)],
        "Project": [page for page in PROJECT if (root / f"{page}.md").exists()],
    }


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make tables of contents from the links of the pages that lead to others.

    A page that none of them leads to is a warning, and so an error of ``make docs``.
    """
    tables: dict[str, list[str]] = {}
    if docname == root_doc:
        tables = contents()
    elif docname.endswith("/index") and docname != "docs/index":
        folder = posixpath.dirname(docname)
        pages = linked(docname, source[0])
        tables = {"Pages": [page for page in pages if posixpath.dirname(page) == folder]}
    for caption, pages in tables.items():
        listed = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def number_references(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Make the references of each docstring its own: many on one page have a ``[1]_``."""
    label = re.sub(r"\W", "-", name)
    definition, use = r"^(\s*\.\. )\[(\d+)\]", r"\[(\d+)\]_"
    for i, line in enumerate(lines):
        labelled = re.sub(definition, rf"\1[#{label}-\2]", line)
        lines[i] = re.sub(use, rf"[#{label}-\1]_", labelled)


def skip_members(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any
) -> bool | None:
    """Leave out what binds an interface to its function: its inputs and outputs say it all."""
    return True if name in ("function", "input_spec", "output_spec", "method", "stage") else None


def link_to_public_name(
    app: Sphinx, env: BuildEnvironment, node: Element, contnode: Element
) -> Element | None:
    """Link ``package.module.name`` of the code to ``package.name``, where it is documented."""
    *modules, name = node["reftarget"].split(".")
    for module in (".".join(modules), ".".join(modules[:-1]), node.get("py:module") or ""):
        if (public := f"{module}.{name}") in env.domains.python_domain.objects:
            return env.domains.python_domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], public, node, contnode
            )
    return None


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", number_references)
    app.connect("missing-reference", link_to_public_name)
    app.connect("autodoc-skip-member", skip_members)

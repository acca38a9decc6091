"""The site: `make docs`."""

import os
import re
from importlib.metadata import version as version_of
from pathlib import Path

project = "sparse-engine"
version = release = version_of("sparse-engine")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"sparse-engine {version}"
html_show_sphinx = html_show_copyright = False
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

DOCS = Path(__file__).parent
STUB = re.compile(r"See \[.*\]\((.+)\)\.\n")
LINK = re.compile(r"(?<=\]\()(?!https?:)([^)#\s]+)")
# A page that stands elsewhere in the checkout -> the stub that it is read into.
STANDS_IN = {
    (stub.parent / found[1]).resolve(): stub
    for stub in sorted(DOCS.glob("pages/*.md"))
    if (found := STUB.fullmatch(stub.read_text()))
}


def read_page(_app: object, name: str, source: list[str]) -> None:
    """Put a stub's page in its place, and let links lead to pages of the site where there are some."""
    here = DOCS / f"{name}.md"
    page = next((real for real, stub in STANDS_IN.items() if stub == here), here)
    text = source[0] if page == here else page.read_text()

    def relink(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        return os.path.relpath(STANDS_IN.get(target, target), here.parent)

    source[0] = LINK.sub(relink, text)


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_page)  # type: ignore[attr-defined]

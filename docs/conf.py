"""The site that `make docs` builds with Sphinx: the documents as a code host shows them, and a reference of the API.

The source folder is the repository, so that links between README, docs/ and examples/ are the same in both.
"""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

import distgan

project = "distgan"
version = release = distgan.__version__
project_copyright = "the distgan authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/*.rst", "examples/*/README.md"]
exclude_patterns = [".*", "benchmarks", "distgan", "docs/_build", "runs", "tests", "wandb"]
# The order of the sidebar. Further pages of docs/ follow.
PAGES = ["docs/getting_started", "docs/data", "docs/recipes", "docs/training", "docs/distributed", "docs/evaluation"]
PAGES += ["docs/applications", "docs/api", "docs/reference", "docs/performance", "docs/troubleshooting"]
LAST = ["examples/browser/README", "CONTRIBUTING", "CHANGELOG"]

myst_heading_anchors = 3  # the anchors that code hosts make
default_role = "code"  # docstrings write `code` as Markdown does
autodoc_class_signature = "separated"  # settings are listed below a class, not in its first line
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = "furo"  # loads no fonts or scripts from elsewhere
html_title = f"distgan {release}"
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_index)


def _add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Adds the table of contents, which only the site needs, to the first page."""
    if name == root_doc:
        others = sorted(f"docs/{page.stem}" for page in Path(__file__).parent.glob("*.md"))
        pages = [*PAGES, *(page for page in others if page not in PAGES), *LAST]
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(f"/{page}" for page in pages) + "\n```\n"


def _add_index(app: Sphinx, error: Exception | None) -> None:
    """Makes the first page the one that a server shows for the folder."""
    if error is None and app.builder.name == "html":
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")

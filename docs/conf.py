"""Sphinx: `make docs` builds the pages of the repository into build/docs, README.md first.

A link or an anchor that leads nowhere fails the build.
"""

from pathlib import Path
from typing import Any

project = "post-training"
author = "the post-training maintainers"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "README"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("docs/**", "installation/**", "reproducibility/**"),
]
html_theme = "furo"
html_title = "post-training"
html_copy_source = False
html_show_sphinx = False
# As GitHub names them: a link works in the repository and on the site.
myst_heading_anchors = 4

# The side bar. It is not in the pages, which would show it as code in the repository. A page that
# is in none of these is found by its links.
suppress_warnings = ["toc.not_included"]
_CONTENTS = {
    "Start": ["docs/start/laptop", "docs/start/alps", "docs/start/lumi", "docs/start/slurm"],
    "Guides": [
        *("docs/guides/data", "docs/guides/formats", "docs/guides/clean-data"),
        *("docs/guides/models", "docs/guides/convert", "docs/guides/templates"),
        *("docs/guides/sft", "docs/guides/chat", "docs/guides/annotate", "docs/guides/workers"),
        *("docs/guides/preference", "docs/guides/reproduce", "docs/guides/publish"),
        *("docs/guides/exec", "docs/guides/reports", "docs/guides/pipelines"),
        *("docs/guides/submit", "docs/guides/images", "docs/guides/sites"),
        *("docs/guides/remote-development", "docs/guides/troubleshooting"),
    ],
    "Coming from": [
        *("docs/from/swissai", "docs/from/openeurollm", "docs/from/axolotl", "docs/from/neox"),
        "docs/from/open-instruct",
    ],
    "Concepts": ["docs/concepts/nouns", "docs/concepts/identity", "docs/concepts/promises"],
    "Reference": [
        *("docs/reference/commands", "docs/reference/files", "docs/reference/templates"),
        "docs/reference/settings/index",
    ],
    "Places and experiments": ["installation/README", "reproducibility/README"],
    "The project": ["CONTRIBUTING", "docs/contributing", "docs/releases", "CHANGELOG"],
}


def _add_contents(_app: Any, page: str, source: list[str]) -> None:
    if page == root_doc:
        for caption, pages in _CONTENTS.items():
            source[0] += _toctree([f"/{page}" for page in pages], f":caption: {caption}\n")
    elif page == "docs/reference/settings/index":
        folder = Path(__file__).parent / "reference/settings"
        source[0] += _toctree(sorted(p.stem for p in folder.glob("*.md") if p.stem != "index"))


def _toctree(pages: list[str], options: str = "") -> str:
    lines = "\n".join(pages)
    return f"\n\n```{{toctree}}\n:hidden:\n{options}\n{lines}\n```\n"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)

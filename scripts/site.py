"""Hooks of mkdocs: the README is the site's first page, the API's page is made of the public names, and links to files
that are no pages lead to the repository."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

import ddit

ROOT = Path(__file__).parents[1]
FIRST, LAST = ["apply", "handle.Handle"], ["config.Coarse"]
API = [*FIRST, *(name for name in ddit.__all__ if name not in ("__version__", *FIRST)), *LAST]


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages = {
        "index.md": (ROOT / "README.md").read_text(),
        "api.md": "# API\n\n" + "\n\n".join(f"::: ddit.{name}" for name in API),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links are written for the repository, where the README lies beside the folder of the docs."""
    index = page.file.src_path == "index.md"

    def moved(link: re.Match[str]) -> str:
        target = normpath(f"{'.' if index else 'docs'}/{link[1]}")
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}" if index else link[0]
        return f"]({config.repo_url}/blob/main/{target}"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", moved, markdown)

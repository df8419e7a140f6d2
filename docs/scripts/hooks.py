"""Takes files from outside docs/ into the site: figures of bench/results, and the examples.

Pages link to them where they lie in the repository, so that the links work there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent

#: Folders of the repository, with the patterns of the files that are taken.
FOLDERS = {"bench/results": "**/*.png", "examples": "*"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files under their paths in the repository."""
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file():
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Let links that leave docs/ lead to these files."""
    up = "../" * page.file.src_uri.count("/")
    for folder in FOLDERS:
        markdown = markdown.replace(f"({up}../{folder}/", f"({up}{folder}/")
    return markdown

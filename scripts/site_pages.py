"""An mkdocs hook (mkdocs.yml): the site's home page is README.md, and CONTRIBUTING.md and CHANGELOG.md are pages of it.

They stand at the root of the repository, where GitHub and newcomers look; here their links are written for docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=LINK.sub(_moved, text)))
    return files


def _moved(link: re.Match[str]) -> str:
    """A link from the repository's root as one from docs/."""
    target, hash_, anchor = link[1].partition("#")
    return f"]({PAGES.get(target, target.removeprefix('docs/'))}{hash_}{anchor})"

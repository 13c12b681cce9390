"""Reads what the scripts that make data have written."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1] / "scripts"


@dataclass(frozen=True)
class Stored:
    """One sample as read back from a shard."""

    jpeg: bytes
    text: str
    about: dict[str, Any]


def read(folder: Path) -> list[Stored]:
    """Every sample of a split; fails where one lacks its picture, text or JSON."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in parts[key], f"{key} twice in {path.name}"
                parts[key][extension] = file.read()
        for key, files in parts.items():
            assert set(files) == {"jpg", "txt", "json"}, key
            samples.append(Stored(files["jpg"], files["txt"].decode(), json.loads(files["json"])))
    return samples

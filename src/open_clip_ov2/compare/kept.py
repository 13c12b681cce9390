"""What a comparison has measured and keeps: small JSON files, written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError


def key_of(told: Any) -> str:
    """Sixteen hexadecimal digits of anything JSON-ready."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_kept(file: Path) -> dict[str, Any]:
    """Empty for a file that is not there. Raises UserError."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not what `ov2 compare` keeps ({error}); remove it to measure again") from None


def keep(file: Path, known: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    part.replace(file)

"""Step memory and largest batch of each model, from what `ov2 bench --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.results import Cost
from open_clip_ov2.errors import UserError


def read_costs(path: Path) -> dict[str, Cost]:
    """By model. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(arm["model"]): _cost(arm) for arm in found["arms"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--bench {path}: not what `ov2 bench --json` writes ({error})") from error


def _cost(arm: Mapping[str, Any]) -> Cost:
    return Cost(arm.get("step_memory_mb"), arm.get("largest_batch"))

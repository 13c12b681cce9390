"""Step memory and largest batch of each model, from what `ov2 bench --json` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.results import Cost
from open_clip_ov2.errors import UserError

Costs = dict[tuple[str, int], Cost]  # by model and resolution
MIB = 2**20


def read_costs(path: Path) -> Costs:
    """Of several batch sizes or precisions at one resolution the first measured counts. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return _costs(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"--bench {path}: not what `ov2 bench --json` writes ({told})") from error


def _costs(found: Any) -> Costs:
    largest = {(one["arm"], one["resolution"], one["precision"]): one["batch_size"] for one in found["largest_batch"]}
    out: Costs = {}
    for one in found["measured"]:
        memory = one["step_bytes"] / MIB if one["step_bytes"] else None
        batch = largest.get((one["arm"], one["resolution"], one["precision"]))
        out.setdefault((one["model"], one["resolution"]), Cost(memory, batch))
    return out

"""Step memory of each arm, and the largest batch that trains, by the contenders of `ov2 bench`; kept in costs.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip_ov2.bench.cases import Job
from open_clip_ov2.bench.run import largest_batch, step_memory
from open_clip_ov2.compare.results import Cost

COSTS_FILE = "costs.json"
MIB = 2**20


def measure_costs(jobs: Sequence[Job], with_batch: bool, folder: Path, say: Callable[[str], None]) -> list[Cost]:
    """Of each job, at its own batch size; `with_batch`: the largest one too. What is known is not measured again.

    Raises UserError, RunFailed.
    """
    return [_cost(job, with_batch, folder / COSTS_FILE, say) for job in jobs]


def _cost(job: Job, with_batch: bool, file: Path, say: Callable[[str], None]) -> Cost:
    known: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = key_of(job)
    found = known.get(key, {})
    if "step_memory_mb" not in found:
        memory = step_memory(job)
        found["step_memory_mb"] = None if memory is None else memory / MIB
        say(f"step memory of {job.arm}: {'more than there is' if memory is None else f'{memory / MIB:,.0f} MiB'}")
    if with_batch and "largest_batch" not in found:
        found["largest_batch"] = largest_batch(job, say)
    known[key] = found
    file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return Cost(found["step_memory_mb"], found.get("largest_batch") if with_batch else None)


def key_of(job: Job) -> str:
    """Arms that differ in name alone cost the same."""
    told = json.dumps({**asdict(job), "arm": ""}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

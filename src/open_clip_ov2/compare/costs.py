"""Step memory of each arm, and the largest batch that trains, by the contenders of `ov2 bench`; kept in costs.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from open_clip_ov2.compare.bench.cases import Job
from open_clip_ov2.compare.bench.run import largest_batch, step_memory
from open_clip_ov2.compare.kept import keep, key_of, read_kept
from open_clip_ov2.compare.results import Cost
from open_clip_ov2.errors import UserError

COSTS_FILE = "costs.json"
MIB = 2**20


def measure_cost(job: Job, with_batch: bool, folder: Path, say: Callable[[str], None]) -> Cost:
    """At the job's own batch size; `with_batch`: the largest one too. What is known is not measured again.

    Raises UserError: the job does not fit; RunFailed.
    """
    file = folder / COSTS_FILE
    known = read_kept(file)
    plain = asdict(replace(job, arm="", memory_limit_gb=None))  # arms that differ in name alone cost the same
    memory_key, batch_key = key_of(["step memory", plain]), key_of(["largest batch", plain, job.memory_limit_gb])
    if memory_key not in known:
        found = step_memory(replace(job, memory_limit_gb=None))
        if found is None:
            case = job.case
            raise UserError(
                f"arm {job.arm}: a batch of {case.batch_size} at {case.resolution} px does not fit into memory; give "
                "all arms a smaller batch-size"
            )
        known[memory_key] = found / MIB
        keep(file, known)
        say(f"step memory of {job.arm}: {found / MIB:,.0f} MiB")
    if with_batch and batch_key not in known:
        known[batch_key] = largest_batch(job, say)
        keep(file, known)
    return Cost(known[memory_key], known[batch_key] if with_batch else None)

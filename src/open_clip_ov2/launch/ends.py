"""Why the ranks of a job ended: what they wrote themselves, and what is made of it. Standard library alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from open_clip_ov2.launch.folder import write_json

OWN, PEER = "own", "peer"  # it would happen again; no more than that another rank is gone
DEATHS = "deaths.json"


@dataclass(frozen=True)
class End:
    """A rank that ended before the run did."""

    job_id: str
    restart: int
    rank: int
    kind: str
    reason: str
    when: float


def restart_count(environment: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has started this job again."""
    return int(environment.get("SLURM_RESTART_COUNT", 0))


def write_end(folder: Path, end: End) -> None:
    write_json(folder / f"{end.job_id}.{end.restart}.{end.rank}.json", asdict(end))


def read_ends(folder: Path, job_id: str, restart: int) -> list[End]:
    """Of one start of one job, the first to end first."""
    found = [End(**json.loads(path.read_text())) for path in folder.glob(f"{job_id}.{restart}.*.json")]
    return sorted(found, key=lambda end: end.when)


@dataclass(frozen=True)
class Verdict:
    again: bool
    reason: str


def judge(ends: list[End], status: int, deaths: list[str], newest: str, limit: int) -> Verdict:
    """What becomes of a job whose srun ended with `status`.

    `deaths`: the newest checkpoint at each earlier death of the run; `newest`: at this one.
    """
    own = [end for end in ends if end.kind == OWN]
    if own:
        return Verdict(False, own[0].reason)
    if status > 128:
        how = f"a rank was killed (signal {status - 128})"
    else:
        how = f"a rank was lost (srun's status {status})"
    since = 1
    for before in reversed(deaths):
        if before != newest:
            break
        since += 1
    if since >= limit:
        where = f"since {newest}" if newest else "before its first checkpoint"
        return Verdict(False, f"{how}; it has now died {since} times {where}: look at its logs (max-deaths)")
    return Verdict(True, f"{how}; started again")


def newest_checkpoint(run_dir: Path) -> str:
    """The file written last, by name; empty if there is none."""
    found = sorted((run_dir / "checkpoints").glob("stage_*.pt"), key=lambda path: path.stat().st_mtime)
    return found[-1].name if found else ""


def note_death(folder: Path, member: int, newest: str) -> list[str]:
    """Earlier entries of this member; `newest` is added to them."""
    path = folder / f"{member}.{DEATHS}"
    before: list[str] = json.loads(path.read_text()) if path.is_file() else []
    write_json(path, [*before, newest])
    return before

"""Why the ranks of a job ended, and whether SLURM should requeue the job.

`python -m open_clip_ov2.launch.ends FOLDER STATUS` is what the batch script runs after a failed srun: it exits with 75
if the job should be requeued, else with srun's status, and writes the reason into the run's status.json.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.launch.folder import Submission
from open_clip_ov2.launch.submitted import is_captions, newest_checkpoint
from open_clip_ov2.locks import job_id, restart_count
from open_clip_ov2.tracking.status import FAILED, INTERRUPTED, Status, read_status, write_status


def record_error(folder: Path, rank: int, reason: str, in_use: bool = False) -> None:
    """Note an error of this rank of this start of the job, which would happen again. `in_use`: another process works
    in the run's folder."""
    record = {"reason": reason, "when": time.time(), "in_use": in_use}
    write_json(folder / f"{job_id()}.{restart_count()}.{rank}.json", record)


def read_errors(folder: Path, job_id: str, restart: int) -> list[dict[str, Any]]:
    """What the ranks have recorded in one start of one job, in the order of time."""
    found: list[dict[str, Any]] = [read_json(path, dict) for path in folder.glob(f"{job_id}.{restart}.*.json")]
    return sorted(found, key=lambda record: float(record["when"]))


def decide_requeue(error: str | None, status: int, earlier: list[str], newest: str, limit: int) -> tuple[bool, str]:
    """Whether to requeue a job whose srun ended with `status`, and the reason.

    A rank's own `error` fails the run. A lost rank is worth a new start, but not `limit` times in a row without a new
    checkpoint: `earlier` has the newest checkpoint at each earlier loss, `newest` is the one at this loss.
    """
    if error is not None:
        return False, error
    loss = f"a rank was killed (signal {status - 128})" if status > 128 else f"a rank was lost (srun's status {status})"
    count = 1 + sum(1 for _ in takewhile(lambda checkpoint: checkpoint == newest, reversed(earlier)))
    if count >= limit:
        where = f"since {newest}" if newest else "before the first checkpoint"
        return False, f"{loss}; this happened {count} times {where} (--max-deaths): see the run's logs"
    return True, f"{loss}; the job is requeued"


def record_loss(folder: Path, index: int, newest: str) -> list[str]:
    """Note the newest checkpoint at this loss of a rank of run `index`; returns the earlier notes."""
    path = folder / f"{index}.deaths.json"
    earlier: list[str] = read_json(path, list) if path.is_file() else []
    write_json(path, [*earlier, newest])
    return earlier


def main(folder: Path, status: int) -> int:
    """The exit status of the batch script's check."""
    if status == INTERRUPTED_STATUS:  # the run has saved, but rank 0 could not ask for the requeue itself
        return status
    submission = Submission(folder)
    errors = read_errors(submission.exits, job_id(), restart_count())
    if in_use := [error for error in errors if error.get("in_use")]:  # the run's status.json is the other's
        print(f"ov2: {in_use[0]['reason']}", flush=True)
        return status
    request = submission.request()
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    run_dir = Path(request.members[index].run_dir)
    before = read_status(run_dir) or Status(FAILED)
    newest = newest_checkpoint(run_dir)
    if is_captions(request.members[index].argv):  # its checkpoints are its lines
        newest = f"{before.samples_seen:,} captions"
    earlier = record_loss(submission.exits, index, newest)
    error = errors[0]["reason"] if errors else None
    requeue, reason = decide_requeue(error, status, earlier, newest, request.clusters[0].max_deaths)
    state = INTERRUPTED if requeue else FAILED
    write_status(run_dir, replace(before, state=state, reason=reason, updated=time.time(), job_id=job_id()))
    print(f"ov2: {reason}", flush=True)
    return INTERRUPTED_STATUS if requeue else status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))

"""Run by the batch script after an srun that failed: `python -m open_clip_ov2.launch.after FOLDER STATUS`.

Exits with 75 if the job is to be queued again, else with srun's status; says why in the run's status.json.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.launch.ends import judge, newest_checkpoint, note_death, read_ends, restart_count
from open_clip_ov2.launch.folder import Submission
from open_clip_ov2.tracking.status import FAILED, INTERRUPTED, Status, job_id, read_status, write_status


def decide(folder: Path, status: int) -> int:
    """The exit status."""
    submission = Submission(folder)
    request = submission.request()
    index = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    run_dir = Path(request.members[index].run_dir)
    if status == INTERRUPTED_STATUS:  # saved; rank 0 could not ask for the requeue itself
        return status
    newest = newest_checkpoint(run_dir)
    deaths = note_death(submission.ends, index, newest)
    ends = read_ends(submission.ends, job_id(), restart_count())
    verdict = judge(ends, status, deaths, newest, request.clusters[0].max_deaths)
    before = read_status(run_dir) or Status(FAILED, job_id=job_id())
    state = INTERRUPTED if verdict.again else FAILED
    write_status(run_dir, replace(before, state=state, reason=verdict.reason, updated=time.time(), job_id=job_id()))
    print(f"ov2: {verdict.reason}", flush=True)
    return INTERRUPTED_STATUS if verdict.again else status


if __name__ == "__main__":
    sys.exit(decide(Path(sys.argv[1]), int(sys.argv[2])))

"""What SLURM and this machine know of jobs. Works without accounting (sacct): squeue, scontrol and scancel suffice."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.folder import LOCAL, SLURM
from open_clip_ov2.locks import process_state

PENDING, RUNNING, COMPLETING, UNKNOWN = "PENDING", "RUNNING", "COMPLETING", "UNKNOWN"
_ALIVE = (PENDING, RUNNING, COMPLETING, "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SIGNALING")


@dataclass(frozen=True)
class QueueJob:
    """`state` is SLURM's, or UNKNOWN for a job that SLURM has forgotten. `why`: what a pending job waits for."""

    job_id: str
    state: str
    why: str = ""

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE


def look_up(executor: str, job_ids: Iterable[str]) -> dict[str, QueueJob]:
    """Every given job, by its id. Raises UserError."""
    wanted = list(dict.fromkeys(job_ids))
    found = {name: QueueJob(name, UNKNOWN) for name in wanted}
    if executor == LOCAL:
        found |= {name: QueueJob(name, RUNNING) for name in wanted if _runs_here(name)}
    elif executor == SLURM and wanted and shutil.which("squeue") is not None:
        found |= {job.job_id: job for job in _ask_slurm(wanted) if job.job_id in found}
    return found


def _ask_slurm(job_ids: list[str]) -> list[QueueJob]:
    """All jobs of these arrays. squeue fails for a single id that it has forgotten, but skips it among several."""
    arrays = ",".join(dict.fromkeys(name.split("_")[0] for name in job_ids))
    done = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-j", arrays, "-o", "%i|%T|%r"], capture_output=True, text=True, timeout=60
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return [QueueJob(name, state, "" if why == "None" else why) for name, state, why in rows]


def _runs_here(job_id: str) -> bool:
    """A local job of submitit is named after the process that watches over its tasks."""
    try:
        command = Path(f"/proc/{job_id}/cmdline").read_bytes()
        is_zombie = process_state(int(job_id))[0] in "ZX"
    except (OSError, ValueError):
        return False
    return not is_zombie and (not command or b"submitit" in command)  # empty while the process starts


def may_requeue(job_id: str) -> bool:
    """False for a job that was cancelled, which must not come back. True if SLURM cannot be asked."""
    try:
        return look_up(SLURM, [job_id])[job_id].state in (RUNNING, UNKNOWN)
    except (UserError, OSError, subprocess.SubprocessError):
        return True


def cancel(executor: str, job_ids: Iterable[str]) -> None:
    """Cancel jobs. Raises UserError."""
    for name in job_ids:
        if executor == LOCAL:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(name), signal.SIGTERM)  # reaches its tasks too, which save and exit
        elif executor == SLURM:
            done = subprocess.run(["scancel", name], capture_output=True, text=True, timeout=60)
            if done.returncode and not re.search("already complet|Invalid job id", done.stderr):
                raise UserError(f"scancel {name}: {done.stderr.strip() or 'refused'}")

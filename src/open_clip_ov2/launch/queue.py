"""What SLURM and this machine say of jobs. Works without accounting (sacct): squeue and scontrol alone."""

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

PENDING, RUNNING, COMPLETING, UNKNOWN = "PENDING", "RUNNING", "COMPLETING", "UNKNOWN"
_ALIVE = (PENDING, RUNNING, COMPLETING, "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING", "SIGNALING")


@dataclass(frozen=True)
class QueueJob:
    """`state` in SLURM's words; UNKNOWN: SLURM has forgotten the job. `why`: what a waiting job waits for."""

    job_id: str
    state: str
    why: str = ""
    nodes: str = ""

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE


def look_up(executor: str, job_ids: Iterable[str]) -> dict[str, QueueJob]:
    """Every id asked for is there."""
    wanted = list(dict.fromkeys(job_ids))
    if executor == SLURM:
        return _of_slurm(wanted)
    if executor == LOCAL:
        return {name: QueueJob(name, RUNNING if _runs_here(name) else UNKNOWN) for name in wanted}
    return {name: QueueJob(name, UNKNOWN) for name in wanted}


def _of_slurm(wanted: list[str]) -> dict[str, QueueJob]:
    found = {name: QueueJob(name, UNKNOWN) for name in wanted}
    if not wanted or shutil.which("squeue") is None:
        return found
    masters = ",".join(dict.fromkeys(name.split("_")[0] for name in wanted))
    # One id alone that SLURM has forgotten is an error; of several it leaves those out.
    done = subprocess.run(
        ["squeue", "-h", "-r", "-t", "all", "-j", masters, "-o", "%i|%T|%r|%N"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    for line in done.stdout.splitlines():
        name, state, why, nodes = line.split("|", 3)
        if name in found:
            found[name] = QueueJob(name, state, "" if why == "None" else why, nodes)
    return found


def _runs_here(job_id: str) -> bool:
    """submitit's local jobs are named by the process that watches over their tasks."""
    own = Path("/proc") / job_id
    if Path("/proc/self").exists():
        with contextlib.suppress(OSError):
            command = (own / "cmdline").read_bytes()
            zombie = (own / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
            return not zombie and (not command or b"submitit" in command)  # empty at its very beginning
        return False
    try:
        os.kill(int(job_id), 0)
    except (OSError, ValueError):
        return False
    return True


def cancel(executor: str, job_ids: Iterable[str]) -> None:
    """Raises UserError."""
    for name in job_ids:
        if executor == LOCAL:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(name), signal.SIGTERM)  # its tasks get it too, save and leave
        elif executor == SLURM:
            done = subprocess.run(["scancel", name], capture_output=True, text=True, timeout=60)
            if done.returncode and not re.search("already complet|Invalid job id", done.stderr):
                raise UserError(f"scancel {name}: {done.stderr.strip() or 'refused'}")

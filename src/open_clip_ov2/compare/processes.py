"""Commands side by side, each with its own log and its own threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.errors import UserError

POLL_S = 0.1
STOP_S = 60  # a run that is stopped saves a checkpoint first


@dataclass(frozen=True)
class Command:
    """`title` is for people; what the command prints goes to `log`."""

    title: str
    command: tuple[str, ...]
    log: Path


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(at_once: int) -> int:
    return max(1, cores() // at_once)


def run_all(
    jobs: Sequence[Command], at_once: int, done: Callable[[Command, float], None], threads: int | None = None
) -> None:
    """`at_once` of them, in order. `done` hears of each and its seconds.

    The first that fails stops the others (they save what they have) and is a UserError with its last line.
    """
    waiting, going = list(jobs), dict[Command, tuple[subprocess.Popen[bytes], float]]()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                job = waiting.pop(0)
                going[job] = (_start(job, threads or threads_each(at_once)), time.monotonic())
            time.sleep(POLL_S)
            for job, (process, begun) in list(going.items()):
                status = process.poll()
                if status is None:
                    continue
                del going[job]
                if status:
                    raise UserError(f"{job.title}: {last_line(job.log)} (exit status {status}; all of it: {job.log})")
                done(job, time.monotonic() - begun)
    finally:
        _stop([process for process, _ in going.values()])
        signal.signal(signal.SIGTERM, before)


def _start(job: Command, threads: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    with job.log.open("wb") as log:
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **counts},
        )  # fmt: skip


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """The last that a failed command said, without ov2's prefix."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("ov2: error: ") if lines else "said nothing"

"""RUN/status.json: where a run stands, small enough to be read by anything. `ov2 jobs` reads it, without accounting."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from open_clip_ov2.errors import Interrupted

STATUS_FILE = "status.json"
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Status:
    """`stage` of `stages`, from 1 (0: not there yet). `restarts`: times that the run was begun again. Times are Unix's.

    `finished` with `stage` < `stages`: done as far as it was asked to go (--until-stage).
    """

    state: str
    stage: int = 0
    stages: int = 0
    samples_seen: int = 0
    total_samples: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    restarts: int = 0
    reason: str = ""
    started: float = 0.0
    updated: float = 0.0
    host: str = ""
    pid: int = 0
    job_id: str = ""


def read_status(run_dir: Path) -> Status | None:
    """None if there is none, or none that can be read."""
    try:
        values = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Status)}
        return Status(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write_status(run_dir: Path, status: Status) -> None:
    """Whole or not at all: a reader never sees half of it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".tmp-{STATUS_FILE}.{os.getpid()}"
    values = {key: None if _not_finite(value) else value for key, value in asdict(status).items()}
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / STATUS_FILE)


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """As SLURM and submitit name the job that this process is in: 17, 17_3 (array), a process id (local), or empty."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return environment.get("SLURM_JOB_ID") or environment.get("SUBMITIT_LOCAL_JOB_ID", "")


class StatusFile:
    """Written by one process of a run. `active=False` (ranks other than 0): does nothing.

    A full disk must not end a run: what cannot be written is left out.
    """

    def __init__(self, run_dir: Path, active: bool = True) -> None:
        self._run_dir, self._active = run_dir, active
        if not active:
            return
        before = read_status(run_dir)
        # A run that stopped after a stage, as asked, and goes on has not been restarted.
        again = before is not None and before.state != FINISHED
        now = time.time()
        self._status = replace(
            before or Status(RUNNING),
            state=RUNNING,
            reason="",
            restarts=(before.restarts if before else 0) + again,
            images_per_second=None,
            started=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            job_id=job_id(),
        )
        self.update()

    def update(self, **changes: int | float | str | None) -> None:
        """Fields of Status."""
        if not self._active:
            return
        self._status = replace(self._status, updated=time.time(), **changes)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            write_status(self._run_dir, self._status)

    @contextlib.contextmanager
    def outcome(self) -> Iterator[None]:
        """How the run inside ended becomes its state."""
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as stop:
            self.update(state=INTERRUPTED, reason=one_line(stop))
            raise
        except BaseException as error:
            self.update(state=FAILED, reason=one_line(error))
            raise
        self.update(state=FINISHED)


def one_line(error: BaseException) -> str:
    """Its message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

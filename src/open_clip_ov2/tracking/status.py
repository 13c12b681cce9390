"""RUN/status.json: how far a run is, in a small file. `ov2 jobs` reads it and so needs no SLURM accounting."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import Interrupted, InUse, UserError, first_line
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.locks import job_id

STATUS_FILE = "status.json"
EARLIER = ("submit", STATUS_FILE)  # in a run's folder before the run itself: the launcher's
RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class Status:
    """`stage` of `stages` counts from 1 (0: none has begun). `restarts`: how often the run was started again. `started`
    and `updated` are Unix times. `finished` with `stage` < `stages`: the run stopped where --until-stage says."""

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
    """None if there is no status.json, or none that can be read."""
    try:
        values = read_json(run_dir / STATUS_FILE, dict)
        known = {field.name for field in fields(Status)}
        return Status(**{key: value for key, value in values.items() if key in known})
    except (UserError, TypeError):
        return None


def write_status(run_dir: Path, status: Status) -> None:
    """Whole or not at all: a reader never sees half of it. Not synced to disk, as it is written at every log step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / STATUS_FILE, finite(asdict(status)), sync=False)


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """With None for NaN and infinities, which strict JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


class StatusFile:
    """Written by rank 0 of a run. With `active=False` (other ranks) it does nothing. A full disk must not end a run, so
    an update that cannot be written is skipped."""

    def __init__(self, run_dir: Path, active: bool = True) -> None:
        self._run_dir, self._active = run_dir, active
        before = read_status(run_dir) or Status(FINISHED)
        # A run that stopped after a stage, as asked, and now continues was not restarted.
        restarts = before.restarts + (before.state != FINISHED)
        self._status = replace(
            before,
            state=RUNNING,
            reason="",
            restarts=restarts,
            images_per_second=None,
            started=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            job_id=job_id(),
        )
        self.update()

    def update(self, **changes: int | float | str | None) -> None:
        if not self._active:
            return
        self._status = replace(self._status, updated=time.time(), **changes)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            write_status(self._run_dir, self._status)

    @contextlib.contextmanager
    def outcome(self) -> Iterator[None]:
        """Record how the block ended: finished, interrupted or failed."""
        try:
            yield
        except InUse:  # another process has the folder now, and this file
            raise
        except (Interrupted, KeyboardInterrupt) as stop:
            self.update(state=INTERRUPTED, reason=first_line(stop))
            raise
        except BaseException as error:
            self.update(state=FAILED, reason=first_line(error))
            raise
        self.update(state=FINISHED)

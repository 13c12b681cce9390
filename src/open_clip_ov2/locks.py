"""One process at a time in a folder, on one machine or on several that share a file system.

FOLDER/.lock says who works there. File locks of the system (flock) are not asked: some NFS and Lustre mounts ignore
them. A killed owner leaves the file behind, and whoever comes next tells it from a living one:

- in the same SLURM job, restarted since: dead;
- on the same machine (same boot, same process ids): alive while the process runs that has its id and its start time;
- elsewhere: alive while it touches the file, as it does every `beat_s`. It is dead after DEAD_AFTER beats without a
  touch, by the clock of the file server, which stamps the file and a probe to compare it with; the last two of them
  are watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from open_clip_ov2.errors import InUse, UserError
from open_clip_ov2.files import TEMPORARY, read_json, write_json

LOCK = ".lock"
BEAT_S, DEAD_AFTER = 5.0, 12  # ours: a file server may hang for most of a minute
TAKEOVER_S = 5.0  # ours: to replace a dead owner takes milliseconds


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """Id of the job that this process is in, as SLURM and submitit name it: 17, 17_3 (array), a process id (local), or
    empty."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return environment.get("SLURM_JOB_ID") or environment.get("SUBMITIT_LOCAL_JOB_ID", "")


def restart_count(environment: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has restarted this job."""
    return int(environment.get("SLURM_RESTART_COUNT", 0))


def _machine() -> str:
    """Where process ids mean the same as here: boot and pid namespace (containers). Empty without Linux's /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, str]:
    """(state, start in clock ticks since boot) of a process here, from proc(5)'s stat. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _own_start() -> str:
    with contextlib.suppress(OSError):
        return process_state(os.getpid())[1]
    return ""


@dataclass(frozen=True)
class Owner:
    """Who works in a folder; the default is this process. `since` is a Unix time, `token` unlike any other owner's."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=_machine)
    pid: int = field(default_factory=os.getpid)
    start: str = field(default_factory=_own_start)
    cluster: str = field(default_factory=lambda: os.environ.get("SLURM_CLUSTER_NAME", ""))
    job: str = field(default_factory=job_id)
    restart: int = field(default_factory=restart_count)
    since: float = field(default_factory=time.time)
    beat_s: float = BEAT_S

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


# What was killed between making the file and writing it.
UNKNOWN = Owner("", "", "", 0, "", "", "", 0, 0.0)


class FolderLock:
    """A context in which no other process works in `folder`, which is made if it is missing.

    Entering raises InUse, before any file is touched, if another process does. `check` raises it if one has taken the
    folder since, as this process gave no sign of life; then nothing should be written any more.
    """

    def __init__(self, folder: Path, beat_s: float = BEAT_S) -> None:
        self._path = folder / LOCK
        self._beat_s = beat_s
        self._taken_by: Owner | None = None
        self._ended = threading.Event()

    def __enter__(self) -> FolderLock:
        self._own = Owner(beat_s=self._beat_s)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _take(self._path, self._own)
        except OSError as error:
            raise UserError(f"{self._path.parent}: cannot be used ({error.strerror}); name another folder") from error
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError, UserError):  # a file server that hangs, a folder that is gone
                os.utime(self._path)
                owner = _read(self._path)
                if owner.token and owner.token != self._own.token:
                    self._taken_by = owner
                    return

    def check(self) -> None:
        if self._taken_by is not None:
            raise InUse(
                f"{self._path.parent}: {self._taken_by} has taken this folder over, because this process gave no sign "
                "of life; it stops without saving"
            )

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path).token == self._own.token:
                self._path.unlink()


def _take(path: Path, own: Owner) -> None:
    """Make `own` the owner. Raises InUse if there is a living one.

    Only one of those who find an owner dead may replace it: the one that makes a second lock, named after the dead
    owner, by the same rules. The others wait for the outcome, for TAKEOVER_S at most.
    """
    deadline = time.monotonic() + TAKEOVER_S
    while True:
        with contextlib.suppress(FileExistsError):
            return _create(path, own)
        with contextlib.suppress(FileNotFoundError):  # released while we looked
            owner = _read(path)
            if not _is_dead(path, owner, own):
                if owner == UNKNOWN:
                    continue  # it has been written meanwhile
                raise InUse(_in_use(path, owner))
            claim = path.with_name(f"{path.name}.{owner.token}")
            try:
                _take(claim, own)
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            try:
                if _read(path) == owner:
                    return write_json(path, asdict(own))
            finally:
                claim.unlink(missing_ok=True)


def _create(path: Path, own: Owner) -> None:
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(json.dumps(asdict(own)))
            file.flush()
        except OSError:  # a full disk
            path.unlink()
            raise


def _read(path: Path) -> Owner:
    """Raises FileNotFoundError."""
    try:
        return Owner(**read_json(path, dict))
    except (UserError, TypeError):
        path.stat()
        return UNKNOWN


def _in_use(path: Path, owner: Owner) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return (
        f"{path.parent}: {owner} has been working in this folder since {since}; wait until it ends, stop it, or name "
        f"another folder (if this one is a copy, remove {path})"
    )


def _is_dead(path: Path, owner: Owner, own: Owner) -> bool:
    """May wait for a sign of life. Raises FileNotFoundError if the file goes meanwhile."""
    if owner.job and (owner.cluster, owner.job) == (own.cluster, own.job) and owner.restart < own.restart:
        return True
    if owner.machine and owner.machine == own.machine:
        try:
            os.kill(owner.pid, 0)
            state, start = process_state(owner.pid)
        except (ProcessLookupError, FileNotFoundError):
            return True
        except OSError:  # another user's process, which some systems hide
            return _is_silent(path, owner)
        return state in "ZX" or start != owner.start
    return _is_silent(path, owner)


def _is_silent(path: Path, owner: Owner) -> bool:
    """Whether the owner has not touched the file for DEAD_AFTER beats. Waits until it does, or until they are over."""
    last = path.stat().st_mtime
    probe = path.with_name(f"{TEMPORARY}{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    age_s = probe.stat().st_mtime - last
    probe.unlink()
    # Where clients stamp files (Lustre), clocks may differ: two beats are waited for in any case.
    deadline = time.monotonic() + owner.beat_s * max(2.0, DEAD_AFTER - max(0.0, age_s) / owner.beat_s)
    while time.monotonic() < deadline:
        time.sleep(owner.beat_s / 4)
        with open(path, "rb") as file:  # NFS asks its server again when a file is opened
            if os.fstat(file.fileno()).st_mtime != last:
                return False
    return True

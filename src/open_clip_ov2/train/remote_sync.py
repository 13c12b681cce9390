"""`--remote-sync`: a run's folder copied to an object store or another folder, by one thread that no step waits for.

What changed is copied every so often, records before checkpoints, so that they are there as far as a checkpoint needs
them. Nothing is deleted there; what `--resume FILE` moves aside is moved aside there too. Links are left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from open_clip_ov2.data import storage
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import TEMPORARY
from open_clip_ov2.locks import LOCK
from open_clip_ov2.train.checkpoint import BEST_FILE, CheckpointName, list_checkpoints

logger = logging.getLogger(__name__)

AT_END_S, ON_SIGNAL_S = 3600.0, 60.0  # ours: how long the last copy may take; schedulers kill a minute or two later
FOLDER = "checkpoints/"
MOST_FAILURES = 3  # of one pass, which then ends: the store is away


class RemoteSync:
    """`within_s`: how long `close` waits for the last copy, or ON_SIGNAL_S once `signalled`. `failures`: of all tries
    to copy a file."""

    def __init__(self, folder: Path, address: str, every_s: float, signalled: Callable[[], bool] = bool) -> None:
        self.folder, self.address, self.within_s, self.failures = folder, address, AT_END_S, 0
        self._every_s, self._begun, self._signalled = every_s, time.time(), signalled
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of each file when it was copied
        self._left, self._end = 0, threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, last: str, earlier: tuple[str, ...], trains: bool) -> str:
        """Bring a run back that is there and not here, its newest checkpoint alone. `last` is the file that makes it a
        run; what begins with one of `earlier` stays as it is here. Returns a line for the log. Raises UserError, also
        for a run with checkpoints if this one does not train."""
        if (self.folder / last).exists():
            return ""
        with self._reading():
            names = storage.names_below(self.address)
            if last not in names:
                return ""
            saved = _checkpoints(names)
            if saved and not trains:
                raise UserError(f"{self.address}: this is a training run; give its validation another --name")
            newest = saved[max(saved)] if saved else "no checkpoint"
            records = {name for name in names if not name.startswith(FOLDER)}
            wanted = records | {newest, FOLDER + BEST_FILE} & {*names}
            wanted -= {name for name in wanted if name.startswith(earlier) and (self.folder / name).exists()}
            for name in sorted(wanted, key=lambda name: name == last):
                storage.get(storage.join(self.address, name), self.folder / name)
        return f"--remote-sync: fetched {len(wanted)} files of this run from {self.address} ({newest})"

    def check_newest(self) -> None:
        """Raises UserError if the copy is ahead of the run, which would overwrite its records."""
        with self._reading():
            there = max(_checkpoints(storage.names_below(self.address)), default=None)
        saved = list_checkpoints(self.folder / FOLDER)
        here = CheckpointName.of(saved[-1].name) if saved else None
        if there is not None and (here is None or here < there):
            raise UserError(
                f"{self.folder}: its newest checkpoint is {here.file if here else 'none'}, and its copy in "
                f"{self.address} has {there.file}: the run went on elsewhere, or its newest one was removed here. "
                f"Move {self.folder} away to continue from the copy, or go back by --resume FILE"
            )

    def set_aside(self, begin: CheckpointName, folder: str) -> None:
        """In the copy too, move checkpoints from `begin` on to `folder`, and the best one's note if it is not here;
        `begin` itself, which is here, is copied, so that a kill leaves no older one as the newest."""
        with self._reading("its later checkpoints cannot be set aside"):
            names = storage.names_below(self.address)
            later = {name for one, name in _checkpoints(names).items() if not one < begin}
            if not (self.folder / FOLDER / BEST_FILE).exists():
                later |= {FOLDER + BEST_FILE} & {*names}
            for name in later:
                aside = f"{FOLDER}{folder}/{name.removeprefix(FOLDER)}"
                storage.copy(storage.join(self.address, name), storage.join(self.address, aside))
            self._send(self.folder / FOLDER / begin.file)
            for name in later - {FOLDER + begin.file}:
                storage.remove(storage.join(self.address, name))

    @contextlib.contextmanager
    def _reading(self, problem: str = "the run cannot be read") -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever the store's library raises
            raise UserError(f"--remote-sync {self.address}: {problem} ({first_line(error)})") from error

    def start(self, first: str) -> None:
        """Copy the file `first`, then all else in the background. Raises UserError if that file cannot be copied."""
        try:
            self._send(self.folder / first)
        except Exception as error:
            raise UserError(f"--remote-sync {self.address}: cannot be written ({first_line(error)})") from error
        self._thread = threading.Thread(target=self._work, name="remote-sync", daemon=True)
        self._thread.start()
        logger.info("--remote-sync: %s is copied to %s every %g s", self.folder, self.address, self._every_s)

    def close(self) -> None:
        """Copy what is left. Waits for `within_s` at most."""
        self._end.set()
        if self._thread is None:
            return
        begun = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - begun < self.within_s:
            self._thread.join(min(self.within_s, 1.0))
            if self._signalled() and self.within_s == AT_END_S:
                self.within_s = time.monotonic() - begun + ON_SIGNAL_S
        if self._thread.is_alive():
            waited = time.monotonic() - begun
            logger.error("REMOTE SYNC: not all is in %s after %.1f s; the process ends", self.address, waited)
        elif not self._left:
            logger.info("--remote-sync: all is in %s, %d failures on the way", self.address, self.failures)

    def _work(self) -> None:
        ends = False
        while not ends:
            ends = self._end.is_set()  # what changed until then is in the pass that begins now
            self._left = self._pass()
            if not ends:
                self._end.wait(self._every_s)

    def _pass(self) -> int:
        """Copy what has changed. Returns how many files could not be copied."""
        failed: list[str] = []
        for path in self._files():
            try:
                self._send(path)
            except Exception as error:  # of any kind: this is a thread, and the run continues
                if path.exists():  # a checkpoint may have been deleted meanwhile
                    failed.append(f"{path.relative_to(self.folder)}: {first_line(error)}")
            if len(failed) == MOST_FAILURES:
                break
        self.failures += len(failed)
        if failed:
            logger.warning(
                "REMOTE SYNC FAILED: %s not copied to %s%s; %d failures so far",
                "; ".join(failed), self.address,
                "" if self._end.is_set() else f"; the run goes on, and copies again in {self._every_s:g} s",
                self.failures,
            )  # fmt: skip
        return len(failed)

    def _files(self) -> list[Path]:
        """Records, then checkpoints, newest first."""
        found: list[Path] = []
        for root, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(TEMPORARY) and not name.endswith(".dcp")]
            found += [Path(root, name) for name in files if not name.startswith((TEMPORARY, LOCK))]
        saved = [path for path in list_checkpoints(self.folder / FOLDER)[::-1] if path.is_file()]
        return [path for path in found if path not in saved and not path.is_symlink()] + saved

    def _send(self, path: Path) -> None:
        """Unless it is there already. Raises whatever the store's library raises."""
        name, stat = path.relative_to(self.folder).as_posix(), path.stat()
        stamp, address = (stat.st_size, stat.st_mtime_ns), storage.join(self.address, name)
        if self._sent.get(name) == stamp:
            return
        earlier = name not in self._sent and stat.st_mtime < self._begun  # perhaps another process has copied it
        if not (earlier and storage.is_current(path, address)):
            storage.put(path, address)
        self._sent[name] = stamp


def _checkpoints(names: list[str]) -> dict[CheckpointName, str]:
    return {one: name for name in names if (one := CheckpointName.of(name.removeprefix(FOLDER)))}

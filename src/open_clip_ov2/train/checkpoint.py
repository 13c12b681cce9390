"""Checkpoints on disk: whole or not at all, written in the background; the last, the best and each stage's end kept.

A file is a plain OpenCLIP checkpoint (`epoch`, `name`, `state_dict`, `optimizer`, `scaler`) with the state to go on
from under RESUME_KEY. `stage_1_samples_4096.pt` lies within stage 1, `stage_1.pt` at its end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

RESUME_KEY = "open_clip_ov2"
BEST_FILE = "best.json"
TEMPORARY = ".tmp-"  # a file that begins so was not finished
WAIT_WORTH_TELLING_S = 5.0  # ours: a shorter wait for the disk costs nobody anything
_NAME = re.compile(r"stage_(\d+)(?:_samples_(\d+))?\.pt")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Where in a run a checkpoint lies; later ones are greater. `stage` counts from 1."""

    stage: int
    done: bool
    samples_seen: int

    @property
    def file(self) -> str:
        return f"stage_{self.stage}.pt" if self.done else f"stage_{self.stage}_samples_{self.samples_seen}.pt"

    @classmethod
    def of(cls, file: str) -> CheckpointName | None:
        found = _NAME.fullmatch(file)
        return found and cls(int(found[1]), found[2] is None, int(found[2] or 0))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    named = [(name, path) for path in folder.glob("*.pt") if (name := CheckpointName.of(path.name)) is not None]
    return [path for _, path in sorted(named)]


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, with its content on the CPU; damaged ones are named and passed over.

    Raises UserError if there are some, and none can be read.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if RESUME_KEY in content:
                return path, content
            logger.warning("%s holds nothing to resume from: passed over", path)
        except Exception as error:  # zip, pickle and I/O errors of every kind: a damaged file must not end the run
            logger.warning("%s cannot be read (%s): passed over", path, _reason(error))
    if found:
        raise UserError(f"{folder}: none of {len(found)} checkpoints can be read; --name a new run, or restore one")
    return None


def _reason(error: BaseException) -> str:
    """One line. Torch wraps what the file system said into words about its own archive: the first cause is wanted."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def snapshot(value: Any) -> Any:
    """A copy on the CPU that no later step changes."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(item) for item in value)
    return value


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; a step waits for the copy alone, or for the one before.

    A failure (disk full) is a loud warning: what was there before stays, and the run goes on.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.failures = 0
        self.last_saved = time.monotonic()
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)

    def save(self, name: CheckpointName, content: dict[str, Any], metric: float | None = None) -> None:
        """`content` is copied now and written later. `metric`: the validation loss at this point, if there is one."""
        copied = snapshot(content)
        start = time.monotonic()
        self.wait()  # never left out: where a run was saved is where it can go on from
        if (waited := time.monotonic() - start) > WAIT_WORTH_TELLING_S:
            logger.warning(
                "waited %.0f s for the checkpoint before %s: saving comes more often than this disk takes "
                "(--save-every-steps, --save-every-minutes)", waited, name.file,
            )  # fmt: skip
        self.last_saved = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(name, copied, metric), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def last_good(self) -> str:
        """The newest finished file, for messages."""
        self.wait()
        found = list_checkpoints(self.folder)
        return str(found[-1]) if found else "none yet"

    def _write(self, name: CheckpointName, content: dict[str, Any], metric: float | None) -> None:
        temporary = self.folder / f"{TEMPORARY}{name.file}"
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name.file)
            _sync_folder(self.folder)
            if metric is not None:
                self._note_best(name.file, metric)
            self._prune()
        except (
            Exception
        ) as error:  # OSError, or torch's RuntimeError around it; anything else must not be silent either
            self.failures += 1
            temporary.unlink(missing_ok=True)
            logger.error(
                "CHECKPOINT NOT WRITTEN: %s: %s. The run goes on; the newest checkpoint is still %s. Free some space.",
                self.folder / name.file, _reason(error), [None, *list_checkpoints(self.folder)][-1],
            )  # fmt: skip

    def _note_best(self, file: str, metric: float) -> None:
        best = read_best(self.folder)
        if best is None or metric < best[1]:
            write_atomically(self.folder / BEST_FILE, json.dumps({"file": file, "caption_loss": metric}) + "\n")

    def _prune(self) -> None:
        best = read_best(self.folder)
        partial = [path for path in list_checkpoints(self.folder) if "_samples_" in path.name]
        for path in partial[: max(0, len(partial) - self.keep)]:
            if best is None or path.name != best[0]:
                path.unlink(missing_ok=True)


def read_best(folder: Path) -> tuple[str, float] | None:
    """(file name, validation caption loss) of the best checkpoint kept, if there is one."""
    try:
        best = json.loads((folder / BEST_FILE).read_text())
        return str(best["file"]), float(best["caption_loss"])
    except (OSError, ValueError, KeyError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """The whole text or, if the process is killed, what was there before."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

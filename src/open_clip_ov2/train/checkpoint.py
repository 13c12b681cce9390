"""Checkpoints on disk, written in the background. The newest few, the best one and that of each stage's end are kept.

A file is a plain OpenCLIP checkpoint (`epoch`, `name`, `state_dict`, `optimizer`, `scaler`) with the training state to
resume from under RESUME_KEY, and under CONFIG_KEY the model's configuration, preprocessing and vocabulary. Where the
weights that one uses are not those that training goes on from (an average of them, or adapters merged), `state_dict` is
what every reader opens, and LIVE_KEY has the difference.
`stage_1_samples_4096.pt` is from within stage 1, `stage_1.pt` from its end; `epoch_latest.pt` may lead to the newest.
With --fsdp-checkpoint sharded the first is a folder, `stage_1_samples_4096.dcp` (train/sharded.py).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import RunFailed, UserError, first_line
from open_clip_ov2.files import TEMPORARY, read_json, write_json, written_whole
from open_clip_ov2.train.parallel import Layout, mapped
from open_clip_ov2.train.sharded import Write, read_sharded

logger = logging.getLogger(__name__)

RESUME_KEY, CONFIG_KEY, LIVE_KEY = "open_clip_ov2", "open_clip_config", "open_clip_ov2_live"
BEST_FILE = "best.json"
LATEST_FILE = "epoch_latest.pt"  # OpenCLIP's name
ASIDE = "replaced-"  # folders of what --resume FILE moves aside
LONG_WAIT_S = 5.0  # ours: a shorter wait for the disk is not worth a warning
State = Mapping[str, torch.Tensor]
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"stage_(\d+)(?:_samples_(\d+))?\.(pt|dcp)")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """When in a run a checkpoint was saved; later ones are greater. `stage` counts from 1; `kind` is `pt` or `dcp`."""

    stage: int
    done: bool
    samples_seen: int
    kind: str = field(default="pt", compare=False)

    @property
    def file(self) -> str:
        return f"stage_{self.stage}" + ("" if self.done else f"_samples_{self.samples_seen}") + f".{self.kind}"

    @classmethod
    def of(cls, file: str) -> CheckpointName | None:
        found = _NAME.fullmatch(file)
        return found and cls(int(found[1]), found[2] is None, int(found[2] or 0), found[3])


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a folder, oldest first."""
    named = [(name, path) for path in folder.glob("*") if (name := CheckpointName.of(path.name)) is not None]
    return [path for _, path in sorted(named)]


def read_checkpoint(path: Path, layout: Layout | None = None) -> dict[str, Any]:
    """Its content on the CPU; of a sharded one with a layout, what this process has of it on its device."""
    if not path.is_dir():
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    content = read_sharded(path, layout)
    live, average = content.pop("state_dict"), content.pop("average")
    if not average:
        return {**content, "state_dict": live}
    published = {**live, **{name: value.to(live[name].dtype) for name, value in average.items()}}
    return {**content, **_with_live(published, {name: live[name] for name in average}, [], average)}


def newest_readable(
    found: list[Path], layout: Layout | None = None, first_of_all: Callable[[str], str] = str
) -> tuple[Path, dict[str, Any]] | None:
    """The newest of `list_checkpoints` that can be read, and its content; a warning names each that cannot. None if
    nothing was found. `first_of_all` gives the first problem of all processes, which then read the same files. Raises
    UserError if none can be read."""
    for path in reversed(found):
        content, problem = {}, ""
        try:
            content = read_checkpoint(path, layout)
            problem = "" if RESUME_KEY in content else "has no training state to resume from"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # zip, pickle and I/O errors of every kind: a damaged file must not end the run
            problem = f"cannot be read ({first_line(_cause(error))})"
        if not (problem := first_of_all(problem)):
            return path, content
        del content  # before the next one is read
        logger.warning("%s %s: skipped", path, problem)
    if found:
        raise UserError(
            f"{found[0].parent}: none of {len(found)} checkpoints can be read; --name a new run, or restore one"
        )
    return None


def _cause(error: BaseException) -> BaseException:
    """The file system's error, which torch replaces by one about its archive."""
    while error.__context__ is not None and not isinstance(error, (OSError, UserError)):
        error = error.__context__
    return error


def weights_content(published: State, live: State, average: State) -> dict[str, Any]:
    """The part of a checkpoint that has weights; `average` (--ema-decay) is float32."""
    changed = {
        name: value
        for name, value in live.items()
        if name not in published or value.data_ptr() != published[name].data_ptr()
    }
    if not changed:
        return {"state_dict": published}
    return _with_live(published, changed, [name for name in published if name not in live], average)


def _with_live(published: State, weights: State, replaced: list[str], average: State) -> dict[str, Any]:
    rest = {k: v for k, v in average.items() if k not in published or published[k].dtype != v.dtype}
    return {"state_dict": published, LIVE_KEY: {"weights": weights, "replaced": replaced, "average": rest}}


def live_weights(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict that training goes on from."""
    live = content.get(LIVE_KEY, {"weights": {}, "replaced": ()})
    kept = {name: value for name, value in content["state_dict"].items() if name not in set(live["replaced"])}
    return {**kept, **live["weights"]}


def average_of(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The average of the trained weights, as far as the checkpoint has one."""
    live = content.get(LIVE_KEY, {"weights": {}, "average": {}})
    published = content["state_dict"]
    return {**{name: published[name] for name in live["weights"] if name in published}, **live["average"]}


def snapshot(value: Any) -> Any:
    """A copy on the CPU, which later steps do not change."""
    return mapped(lambda one: one.detach().to("cpu", copy=True) if isinstance(one, torch.Tensor) else one, value)


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread. A step waits for the copy to memory, and for the previous file. The
    last `keep` files from within stages are kept, and always the newest; with `latest` a link leads to that one. If a
    file cannot be written (disk full), an error is logged, older checkpoints stay, and the run continues."""

    def __init__(self, folder: Path, keep: int, latest: bool = False) -> None:
        self.folder, self.keep, self.latest = folder, keep, latest
        self.failure: str | None = None  # why the newest save was not written; None if it was
        self.last_saved = time.monotonic()
        self._thread: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            _remove(leftover)

    def save(
        self, name: CheckpointName, content: dict[str, Any], metric: float | None = None, write: Write | None = None
    ) -> None:
        """`content` is copied now and written later, to one file or as `write` does it. `metric` is the validation loss
        at this point, if there is one."""
        copied, start = snapshot(content), time.monotonic()
        self.wait()
        if (waited := time.monotonic() - start) > LONG_WAIT_S:
            logger.warning(
                "training waited %.0f s until the checkpoint before %s was written: save less often "
                "(--save-every-steps, --save-every-minutes)", waited, name.file,
            )  # fmt: skip
        self.last_saved = time.monotonic()
        write = write or partial(self._write_file, name)
        self._thread = threading.Thread(target=self._write, args=(name, copied, metric, write), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def last_good(self) -> str:
        """The newest file, for messages."""
        self.wait()
        found = list_checkpoints(self.folder)
        return str(found[-1]) if found else "none yet"

    def check_saved(self, what: str) -> None:
        """Raises RunFailed, which begins with `what`, if the newest save was not written."""
        newest = self.last_good()
        if self.failure is not None:
            raise RunFailed(
                f"{what}, but the checkpoint was not written ({self.failure}); the same command resumes from "
                + ("the beginning" if newest == "none yet" else newest)
            )

    def _write_file(self, name: CheckpointName, content: dict[str, Any]) -> None:
        with written_whole(self.folder / name.file) as file:
            torch.save(content, file)

    def _write(self, name: CheckpointName, content: dict[str, Any], metric: float | None, write: Write) -> None:
        try:
            write(content)
            self.failure = None
        except Exception as error:  # of any kind: this is a thread, whose error nobody else would report
            cause = _cause(error)
            self.failure, found = first_line(cause), list_checkpoints(self.folder)
            logger.error(
                "CHECKPOINT NOT WRITTEN: %s: %s. The run continues; %s.%s",
                self.folder / name.file, self.failure,
                f"the newest checkpoint is still {found[-1]}" if found else "there is no checkpoint yet",
                " Free some space." if isinstance(cause, OSError) and cause.errno in NO_SPACE else "",
            )  # fmt: skip
            return
        for act in (partial(self._note_best, metric), self._prune, self._link):
            try:
                act(name.file)
            except Exception as error:  # the same
                logger.warning("%s was written, but what follows was not: %s", name.file, first_line(error))

    def _note_best(self, metric: float | None, file: str) -> None:
        best = read_best(self.folder)
        if metric is not None and (best is None or metric < best[1]):
            write_json(self.folder / BEST_FILE, {"file": file, "caption_loss": metric})

    def _link(self, file: str) -> None:
        if not self.latest:
            return
        made = self.folder / f"{TEMPORARY}{LATEST_FILE}"
        try:
            made.unlink(missing_ok=True)
            made.symlink_to(file)
            os.replace(made, self.folder / LATEST_FILE)
        except OSError as error:  # a file system without links
            logger.warning("--save-most-recent: %s: %s", self.folder / LATEST_FILE, first_line(error))

    def _prune(self, written: str) -> None:
        """Keeps the newest one and what was just written: a later one that was damaged may still be there."""
        best, found = read_best(self.folder), list_checkpoints(self.folder)
        partial = [path for path in found if "_samples_" in path.name]
        for path in partial[: max(0, len(partial) - self.keep)]:
            if path != found[-1] and path.name != written and (best is None or path.name != best[0]):
                _remove(path)


def _remove(path: Path) -> None:
    """A file, or a folder, of which no part keeps its name if this is interrupted."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.startswith(TEMPORARY) else path.rename(path.with_name(f"{TEMPORARY}{path.name}.old"))
    shutil.rmtree(gone)


def read_best(folder: Path) -> tuple[str, float] | None:
    """(file name, validation caption loss) of the best checkpoint, if there is one."""
    try:
        best = read_json(folder / BEST_FILE, dict)
        return str(best["file"]), float(best["caption_loss"])
    except (UserError, ValueError, KeyError):
        return None

"""Where a run's metrics go: results.jsonl, the trackers of `--report-to`, and the progress line on a terminal.

To add a tracker, write a subclass of `Tracker` here and give it a line in `TRACKERS`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from open_clip_ov2.errors import UserError, first_line, unknown_key
from open_clip_ov2.files import read_json, read_json_lines, write_json, write_text
from open_clip_ov2.tracking.status import finite

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of its run. With `resumed_at`, the run continues from a checkpoint at that many samples, and
    records after it should be dropped or hidden, because the run writes them again. `flags` are hyperparameters,
    `project` and `notes` are those of --wandb-project-name and --wandb-notes."""

    folder: Path
    resumed_at: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    project: str = "open-clip"
    notes: str = ""


class Tracker:
    """One run's tracker, on rank 0, over all stages. Each method does nothing unless a tracker overrides it."""

    def __init__(self, run: TrackedRun) -> None: ...

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        """Stage `number` (from 1) begins; `title` is empty if the run has one stage."""

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        """Metrics of a log step (`kind` is "train") or of a validation ("val"): grouped for panels (`train/loss`,
        `throughput/mfu`, `val/caption_loss`) in `scalars`, and as one flat record in `row`."""

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        """A picture, such as a contact sheet of captioned images."""

    def finish(self, metrics: Mapping[str, float]) -> None:
        """At the end of the run: its last metrics."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines(Tracker):
    """RUN/results.jsonl: one line for each record, flushed, so that a killed run leaves a readable file. A full disk
    costs no record: lines that cannot be written wait for the next one."""

    def __init__(self, run: TrackedRun) -> None:
        path = run.folder / "results.jsonl"
        if run.resumed_at is not None and path.is_file():
            earlier = (record for record in read_json_lines(path) if record["samples_seen"] <= run.resumed_at)
            write_text(path, "".join(f"{json.dumps(record)}\n" for record in earlier))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._unwritten = b""
        self._stage = 1

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        self._stage = number

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        record = {"kind": kind, "samples_seen": samples_seen, "stage": self._stage, "time": time.time(), **finite(row)}
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            # Unbuffered, so that after a failure the number of written bytes is known.
            written = os.write(self._file.fileno(), self._unwritten)
        except OSError as error:
            logger.warning("results.jsonl: %s; its lines are kept until there is room", error)
        else:
            self._unwritten = self._unwritten[written:]

    def close(self) -> None:
        self._file.close()


class TensorBoard(Tracker):
    """RUN/tensorboard. After a resume, TensorBoard hides the records that the run writes again."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge, folder = None if run.resumed_at is None else run.resumed_at + 1, run.folder / "tensorboard"
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)  # TensorBoard sorts files by the second in their names: a resumed run's must come later
        self._writer = SummaryWriter(str(folder), flush_secs=30, purge_step=purge)
        self._flags = run.flags

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, samples_seen)
        if kind == "val":
            self._writer.flush()

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), samples_seen, dataformats="HWC")

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Hyperparameters, in this run's own event file; SummaryWriter.add_hparams would show it as a second run."""
        from torch.utils.tensorboard.summary import hparams

        flags = {name: value if isinstance(value, (int, float)) else str(value) for name, value in self._flags.items()}
        named = {f"hparam/{name}": value for name, value in metrics.items()}
        for summary in hparams(flags, named):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in named.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases. RUN/wandb.json keeps the run's id, so that a resumed run continues the same one there; records
    that the interrupted process has sent are not sent twice."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb, self._file = wandb, run.folder / "wandb.json"
        fresh: dict[str, Any] = {"id": secrets.token_hex(4), "sent": {}}
        known = read_json(self._file) if self._file.is_file() else fresh
        self._id, self._sent, self._before = known["id"], dict(known["sent"]), dict(known["sent"])
        try:
            self._run = wandb.init(
                project=run.project, name=run.folder.name, id=self._id, resume="allow", notes=run.notes or None,
                dir=str(run.folder), config=dict(run.flags), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"--report-to wandb: {first_line(error)}") from error
        self._run.define_metric("*", step_metric="samples_seen")

    def _log(self, kind: str, samples_seen: int, values: Mapping[str, Any]) -> None:
        if samples_seen > self._before.get(kind, -1):
            self._run.log({"samples_seen": samples_seen, **values})
            self._sent[kind] = samples_seen
            write_json(self._file, {"id": self._id, "sent": self._sent})

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        self._log(kind, samples_seen, scalars)

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        self._log(name, samples_seen, {name: self._wandb.Image(image)})

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update(dict(metrics))

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """trackio, by the run's name; a resumed run continues there. The x axis is its step."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        config = {key: str(value) for key, value in run.flags.items()}
        self._run = trackio.init(run.project, run.folder.name, config=config, resume="allow", embed=False)

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars), step=samples_seen)

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=samples_seen)

    def close(self) -> None:
        self._run.finish()


# By their names in --report-to, which are the names of the packages that they need.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
ALL = ("tensorboard", "wandb")  # of OpenCLIP's `--report-to all`


def tracker_names(report_to: str) -> tuple[str, ...]:
    """The trackers of `--report-to NAME,NAME`. Raises UserError, also for a package that is not installed."""
    asked = (name for name in report_to.split(",") if name)
    names = tuple(dict.fromkeys(name for word in asked for name in (ALL if word == "all" else (word,))))
    for name in names:
        if name not in TRACKERS:
            error = unknown_key("--report-to", name, [*TRACKERS, "all"], "tracker")
            raise UserError(f"{error}; results.jsonl is always written")
        if name in ("wandb", "trackio") and find_spec(name) is None:
            raise UserError(f"--report-to {name}: pip install 'open_clip_ov2[{name}]'")
    return names


class ProgressLine:
    """On a terminal: model and stage, a bar over samples, images/s, loss, time left."""

    def __init__(self, title: str, total_samples: int, console: Console) -> None:
        rate = TextColumn("{task.fields[speed]:.0f} images/s  loss {task.fields[loss]:.3f}")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), rate)
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task(title, total=total_samples, speed=math.nan, loss=math.nan)
        self._progress.start()

    def update(self, samples_seen: int, images_per_second: float, loss: float) -> None:
        self._progress.update(self._task, completed=samples_seen, speed=images_per_second, loss=loss)

    def close(self) -> None:
        self._progress.stop()

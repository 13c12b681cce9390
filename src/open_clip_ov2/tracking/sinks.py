"""Where a run's metrics go: results.jsonl, the trackers of `--report-to`, and the progress line on a terminal.

To add a tracker, write a subclass of `Tracker` here and give it a line in `TRACKERS`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.files import read_json_lines, write_text
from open_clip_ov2.tracking.status import finite

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Tracker:
    """One run's tracker, on rank 0, over all stages. Each method does nothing unless a tracker overrides it.

    The x axis is samples seen. With `resumed_at`, the run continues from a checkpoint at that many samples, and records
    after it should be dropped or hidden, because the run writes them again.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None: ...

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        """Stage `number` (from 1) begins; `title` is empty if the run has one stage."""

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        """Metrics of a log step (`kind` is "train") or of a validation ("val"): grouped for panels (`train/loss`,
        `throughput/mfu`, `val/caption_loss`) in `scalars`, and as one flat record in `row`."""

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        """A picture, such as a contact sheet of captioned images."""

    def text(self, name: str, markdown: str, samples_seen: int) -> None:
        """Markdown text."""

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """At the end of the run: its flags, and its last metrics."""

    def close(self) -> None:
        """Write what is buffered."""


class JsonLines(Tracker):
    """RUN/results.jsonl: one line for each record, flushed, so that a killed run leaves a readable file.

    A full disk costs no record: lines that cannot be written wait for the next one.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None:
        path = run_dir / "results.jsonl"
        if resumed_at is not None and path.is_file():
            earlier = (record for record in read_json_lines(path) if record["samples_seen"] <= resumed_at)
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

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=30, purge_step=purge)

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        if title:
            self._writer.add_text("run/stage", f"stage {number}: {title}", samples_seen)

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, samples_seen)
        if kind == "val":
            self._writer.flush()

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), samples_seen, dataformats="HWC")

    def text(self, name: str, markdown: str, samples_seen: int) -> None:
        self._writer.add_text(name, markdown, samples_seen)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """In this run's own event file; SummaryWriter.add_hparams would show it as a second run."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}
        named = {f"hparam/{name}": value for name, value in metrics.items()}
        for summary in hparams(plain, named):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in named.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard}  # by their names in --report-to


def tracker_names(report_to: str) -> tuple[str, ...]:
    """The trackers of `--report-to NAME,NAME`. Raises UserError."""
    names = tuple(dict.fromkeys(name for name in report_to.split(",") if name))
    for name in set(names) - set(TRACKERS):
        error = unknown_key("--report-to", name, TRACKERS, "tracker")
        raise UserError(f"{error}; results.jsonl is always written")
    return names


class ProgressLine:
    """On a terminal: model and stage, a bar over samples, images/s, loss, time left."""

    def __init__(self, title: str, total_samples: int, console: Console) -> None:
        rate = TextColumn("{task.fields[speed]:.0f} images/s  loss {task.fields[loss]:.3f}")
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), rate)
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self._task = self._progress.add_task(title, total=total_samples, speed=math.nan, loss=math.nan)
        self._progress.start()

    def update(self, samples_seen: int, images_per_second: float | None, loss: float | None) -> None:
        known = {"speed": images_per_second, "loss": loss}
        fields: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        self._progress.update(self._task, completed=samples_seen, **fields)

    def close(self) -> None:
        self._progress.stop()

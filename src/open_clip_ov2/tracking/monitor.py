"""What the training loop reports to: progress line, log lines, results.jsonl, trackers, status.json.

Units: `_s` is seconds, `memory_mb` mebibytes. The x axis of everything is samples seen.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from torch import Tensor

from open_clip_ov2.tracking.log import FILE_ONLY
from open_clip_ov2.tracking.sheet import Captioned, contact_sheet
from open_clip_ov2.tracking.sinks import TRACKERS, JsonLines, ProgressLine, TrackedRun, Tracker
from open_clip_ov2.tracking.status import StatusFile
from open_clip_ov2.tracking.throughput import BottleneckWatch, Meter, Window, peak_memory

logger = logging.getLogger("open_clip_ov2")

SILENCE_S = 30.0  # ours: a person begins to worry about a run that prints nothing for longer


@dataclass(frozen=True)
class StageInfo:
    """Stage `number` (from 1) of `of`, with `samples` in all, of which `first_sample` are seen, in `first_step` steps.
    `workers` are data workers of each process."""

    number: int
    of: int
    title: str
    first_step: int
    first_sample: int
    samples: int
    samples_before: int
    meter: Meter | None = None
    workers: int | None = None

    @property
    def last_sample(self) -> int:
        """Samples seen in the whole run when this stage ends."""
        return self.samples_before + self.samples


class RunMonitor:
    """Reports one run, over all its stages. Ranks other than 0 count skipped samples and do nothing else. `trackers`:
    names in TRACKERS. `gather` sums counts over all processes, which call it together at every log step."""

    def __init__(
        self,
        run: TrackedRun,
        rank: int,
        *,
        log_every_n_steps: int,
        trackers: Sequence[str] = (),
        model_name: str = "",
        device_type: str = "cpu",
        console: Console | None = None,
        gather: Callable[[dict[str, int]], dict[str, int]] = lambda counts: counts,
    ) -> None:
        self._active, self._log_every, self._gather = rank == 0, log_every_n_steps, gather
        self._model_name, self._device_type = model_name, device_type
        self._stage = StageInfo(1, 1, "", 0, 0, 0, 0)
        self._steps = self._epoch = self._epoch_images = 0
        self._epoch_skips: Counter[str] = Counter()
        self._past_skips: Counter[str] = Counter()  # of all processes, in earlier epochs
        self._window, self._watch = Window(), BottleneckWatch(None)
        self._last_line = time.monotonic()
        self._trackers: list[Tracker] = []
        self._progress: ProgressLine | None = None
        self.last: dict[str, float] = {}
        self.status = StatusFile(run.folder, self._active)
        if self._active:
            run.folder.mkdir(parents=True, exist_ok=True)
            self._trackers = [JsonLines(run), *(TRACKERS[name](run) for name in trackers)]
            self._console = console or Console()

    def begin_stage(self, stage: StageInfo, state: Mapping[str, Any] | None = None) -> None:
        """`state`: `state()` in the checkpoint that the stage continues from."""
        self._stage, self._steps, self._watch = stage, stage.first_step, BottleneckWatch(stage.workers)
        if state is not None:
            self.restore(state)
        if not self._active:
            return
        seen = stage.samples_before + stage.first_sample
        self.status.update(stage=stage.number, stages=stage.of, samples_seen=seen, total_samples=stage.last_sample)
        for tracker in self._trackers:
            tracker.begin_stage(stage.number, stage.title, stage.samples_before)
        self._end_progress()
        if self._console.is_terminal and stage.samples:
            where = f" stage {stage.number}/{stage.of} {stage.title}" if stage.of > 1 else ""
            self._progress = ProgressLine(f"{self._model_name}{where}", stage.last_sample, self._console)

    def state(self) -> dict[str, Any]:
        """For a checkpoint. The skipped samples of this epoch are in the state of the data."""
        return {"total_skips": dict(self._past_skips), "epoch_images": self._epoch_images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state()` of an earlier process."""
        self._past_skips = Counter(state["total_skips"])
        self._epoch_images = state["epoch_images"]

    def start_epoch(self, epoch: int, resumed: bool = False, skips: Mapping[str, int] | None = None) -> None:
        """`resumed`: the epoch continues where an earlier process left it, with the `skips` that it had counted."""
        self._epoch, self._epoch_skips = epoch, Counter(skips or {})
        if not resumed:
            self._epoch_images = 0

    def step(
        self,
        samples_seen: int,
        *,
        losses: Mapping[str, Tensor | float],
        lr: float,
        grad_norm: Tensor | float | None,
        num_images: int,
        num_tokens: Tensor | float | None,
        wait_s: float,
        step_s: float,
        skipped: Mapping[str, int],
    ) -> None:
        """After every optimizer step. Records are written at every Nth step; a line is logged then, and where none was
        logged for SILENCE_S. Only there are tensors read, and so waited for."""
        self._epoch_skips.update(skipped)
        self._steps += 1
        ends = samples_seen == self._stage.last_sample
        records = self._steps == 1 or ends or self._steps % self._log_every == 0
        skips = self._past_skips + Counter(self._gather(dict(self._epoch_skips))) if records else Counter()
        if not self._active:
            return
        self._epoch_images += num_images
        self._window.add(num_images, num_tokens, wait_s, step_s)
        if records or self._is_silent:
            start = time.perf_counter()
            read = losses if grad_norm is None else {**losses, "grad_norm": grad_norm}
            values = {"lr": lr} | {name: float(value) for name, value in read.items()}
            self._window.step_s += time.perf_counter() - start  # until the device had finished
            speed = self._window.rates(self._stage.meter)
            self.last = {**values, **speed}
            self._log_line(samples_seen, [*losses, "lr", "grad_norm"])
            if records:
                self._write_records(samples_seen, values, speed, skips)
        if self._progress is not None:
            rate, loss = (self.last.get(name, math.nan) for name in ("images_per_second", "loss"))
            self._progress.update(samples_seen, rate, loss)

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_line >= SILENCE_S

    def still(self, doing: str) -> None:
        """Log what the run is doing between two steps, if it has logged nothing for SILENCE_S."""
        if self._active and self._is_silent:
            logger.info(doing)
            self._last_line = time.monotonic()

    def _log_line(self, samples_seen: int, names: list[str]) -> None:
        last, total = self.last, self._stage.last_sample
        self.status.update(
            samples_seen=samples_seen, loss=last.get("loss"), images_per_second=last["images_per_second"]
        )
        shown = " ".join(f"{name} {last[name]:.4g}" for name in names if name in last)
        mfu = f", MFU {100 * last['mfu']:.1f}%" if "mfu" in last else ""
        logger.info(
            f"samples {samples_seen:,} of {total:,} ({100 * samples_seen / max(total, 1):.0f}%) {shown} "
            f"{last['images_per_second']:.1f} images/s, waiting for data {100 * last['data_wait_share']:.0f}%{mfu}",
            extra={FILE_ONLY: self._progress is not None},
        )
        self._last_line = time.monotonic()

    def _write_records(
        self, samples_seen: int, values: Mapping[str, float], speed: Mapping[str, float], skips: Mapping[str, int]
    ) -> None:
        """Of the steps since the last records; the next window begins."""
        memory = peak_memory(self._device_type)
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"throughput/{name}": value for name, value in speed.items()}
        scalars |= {"memory/peak_mb": memory.peak_mb, "run/stage": float(self._stage.number)}
        scalars |= {f"data/skipped/{cause}": float(count) for cause, count in skips.items()}
        row = {"step": self._steps, "epoch": self._epoch, **values, **speed, "memory_mb": memory.peak_mb}
        for tracker in self._trackers:
            tracker.write("train", samples_seen, scalars, row)
        if (warning := self._watch.note(speed, self._window.step_s, memory.share)) is not None:
            logger.warning("%s", warning)
        self._window = Window()

    @property
    def epoch_skips(self) -> dict[str, int]:
        """Samples that this process has skipped since the epoch began, by cause."""
        return dict(self._epoch_skips)

    def end_epoch(self, skips: Mapping[str, int]) -> None:
        """Log the samples that all processes together have skipped, by cause."""
        self._past_skips.update(skips)
        self._epoch_skips.clear()
        if not self._active:
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(skips).most_common())
        skipped = f"skipped {sum(skips.values())} samples: {causes}" if skips else "no sample skipped"
        logger.info("epoch %d done (%s samples), %s", self._epoch + 1, f"{self._epoch_images:,}", skipped)

    def evaluation(self, samples_seen: int, epoch: int, metrics: Mapping[str, float]) -> None:
        if not self._active or not metrics:
            return
        scalars = {f"val/{name}": value for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.write("val", samples_seen, scalars, {"epoch": epoch, **metrics})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "num_samples")
        logger.info("validation after %s samples: %s", f"{samples_seen:,}", shown)
        self.last |= {f"val_{name}": value for name, value in metrics.items()}

    def captions(self, samples_seen: int, images: Sequence[np.ndarray], true: list[str], generated: list[str]) -> None:
        """A contact sheet of images, uint8 `(H, W, 3)` each, with the generated and the true caption of each."""
        if len(self._trackers) <= 1:  # results.jsonl shows no images
            return
        cells = [Captioned(*cell) for cell in zip(map(Image.fromarray, images), generated, true, strict=True)]
        sheet = contact_sheet(cells, columns=4)
        for tracker in self._trackers:
            tracker.image("val/captions", sheet, samples_seen)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish(self.last)

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        self._end_progress()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

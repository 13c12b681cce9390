"""What the training loop reports to: progress line, log lines, results.jsonl, trackers, status.json.

Units: `_s` is seconds, `memory_mb` mebibytes. The x axis of everything is samples seen.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from open_clip_ov2.tracking.log import FILE_ONLY
from open_clip_ov2.tracking.sheet import Captioned, contact_sheet
from open_clip_ov2.tracking.sinks import TRACKERS, JsonLines, ProgressLine, Tracker
from open_clip_ov2.tracking.status import StatusFile
from open_clip_ov2.tracking.throughput import BottleneckWatch, Meter, Window, device_memory, peak_memory_mb

logger = logging.getLogger("open_clip_ov2")

Gather = Callable[[dict[str, int]], dict[str, int]]


@dataclass(frozen=True)
class MonitorConfig:
    """`trackers`: names in TRACKERS. `resumed_at`: samples seen at the checkpoint that the run continues from (records
    after it are dropped); None for a new run."""

    run_dir: Path
    rank: int
    log_every_n_steps: int
    trackers: tuple[str, ...]
    model_name: str
    device_type: str = "cpu"
    resumed_at: int | None = None


@dataclass(frozen=True)
class StageInfo:
    """Stage `number` (from 1) of `of`, with `steps` in all, of which `first_step` are done.

    `batch_images` is the global batch size; `workers` are data workers of each process.
    """

    number: int
    of: int
    title: str
    first_step: int
    steps: int
    samples_before: int
    batch_images: int
    meter: Meter | None = None
    workers: int | None = None

    @property
    def last_sample(self) -> int:
        """Samples seen in the whole run when this stage ends."""
        return self.samples_before + self.steps * self.batch_images


class RunMonitor:
    """Reports one run, over all its stages. Ranks other than 0 count skipped samples and do nothing else.

    `gather` sums counts over all processes, which call it together at the steps that are logged.
    """

    def __init__(
        self, config: MonitorConfig, console: Console | None = None, gather: Gather = lambda counts: counts
    ) -> None:
        self._gather = gather
        self._config = config
        self._active = config.rank == 0
        self._stage = StageInfo(1, 1, "", 0, 0, 0, 1)
        self._steps = 0
        self._epoch = 0
        self._epoch_images = 0
        self._epoch_skips: Counter[str] = Counter()
        self._past_skips: Counter[str] = Counter()  # of all processes, in earlier epochs
        self._window = Window()
        self._watch = BottleneckWatch()
        self._trackers: list[Tracker] = []
        self._progress: ProgressLine | None = None
        self.last: dict[str, float] = {}
        self.status = StatusFile(config.run_dir, self._active)
        if self._active:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            classes: list[type[Tracker]] = [JsonLines, *(TRACKERS[name] for name in config.trackers)]
            self._trackers = [tracker(config.run_dir, config.resumed_at) for tracker in classes]
            self._console = console or Console()

    def begin_stage(self, stage: StageInfo, state: Mapping[str, Any] | None = None) -> None:
        """`state`: `state()` in the checkpoint that the stage continues from."""
        self._stage, self._steps = stage, stage.first_step
        self._watch.begin(stage.workers)
        if state is not None:
            self.restore(state)
        if not self._active:
            return
        seen = stage.samples_before + stage.first_step * stage.batch_images
        self.status.update(stage=stage.number, stages=stage.of, samples_seen=seen, total_samples=stage.last_sample)
        for tracker in self._trackers:
            tracker.begin_stage(stage.number, stage.title, stage.samples_before)
        self._end_progress()
        if self._console.is_terminal and stage.steps:
            where = f"stage {stage.number}/{stage.of} {stage.title}" if stage.of > 1 else ""
            self._progress = ProgressLine(
                f"{self._config.model_name} {where}".strip(), stage.last_sample, self._console
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint. The skipped samples of this epoch are in the state of the data."""
        return {"total_skips": dict(self._past_skips), "epoch_images": self._epoch_images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state()` of an earlier process."""
        self._past_skips = Counter(state["total_skips"])
        self._epoch_images = state["epoch_images"]

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_epoch(self, epoch: int, resumed: bool = False, skips: Mapping[str, int] | None = None) -> None:
        """`resumed`: the epoch continues where an earlier process left it, with the `skips` that it had counted."""
        self._epoch = epoch
        if not resumed:
            self._epoch_images = 0
        self._epoch_skips = Counter(skips or {})

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
        """After every optimizer step. Tensors are read, and so waited for, only at steps that are logged."""
        self._epoch_skips.update(skipped)
        self._steps += 1
        logs = self._steps in (1, self._stage.steps) or self._steps % self._config.log_every_n_steps == 0
        skips = self._past_skips + Counter(self._gather(dict(self._epoch_skips))) if logs else Counter()
        if not self._active:
            return
        self._epoch_images += num_images
        self._window.add(num_images, num_tokens, wait_s, step_s)
        if logs:
            start = time.perf_counter()
            values = {name: float(value) for name, value in losses.items()} | {"lr": lr}
            if grad_norm is not None:
                values["grad_norm"] = float(grad_norm)
            self._window.add_seconds(time.perf_counter() - start)
            self._log_step(samples_seen, values, losses, skips)
        if self._progress is not None:
            self._progress.update(samples_seen, self.last.get("images_per_second"), self.last.get("loss"))

    def _log_step(
        self, samples_seen: int, values: Mapping[str, float], losses: Iterable[str], skips: Mapping[str, int]
    ) -> None:
        seconds = self._window.seconds
        speed = self._window.take(self._stage.meter)
        memory_mb = peak_memory_mb(self._config.device_type)
        self.last = {**values, **speed}
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"throughput/{name}": value for name, value in speed.items()}
        scalars |= {"memory/peak_mb": memory_mb, "run/stage": float(self._stage.number)}
        scalars |= {f"data/skipped/{cause}": float(count) for cause, count in skips.items()}
        row = {"step": self._steps, "epoch": self._epoch, **values, **speed, "memory_mb": memory_mb}
        for tracker in self._trackers:
            tracker.write("train", samples_seen, scalars, row)
        self.status.update(
            samples_seen=samples_seen, loss=values.get("loss"), images_per_second=speed["images_per_second"]
        )
        logger.info(self._line(samples_seen, values, speed, losses), extra={FILE_ONLY: self._progress is not None})
        warning = self._watch.note(speed, seconds, device_memory(self._config.device_type))
        if warning is not None:
            logger.warning("%s", warning)

    def _line(
        self, samples_seen: int, values: Mapping[str, float], speed: Mapping[str, float], losses: Iterable[str]
    ) -> str:
        total = self._stage.last_sample
        shown = " ".join(f"{name} {values[name]:.4g}" for name in [*losses, "lr", "grad_norm"] if name in values)
        mfu = f", MFU {100 * speed['mfu']:.1f}%" if "mfu" in speed else ""
        return (
            f"samples {samples_seen:,} of {total:,} ({100 * samples_seen / max(total, 1):.0f}%) {shown} "
            f"{speed['images_per_second']:.1f} images/s, waiting for data {100 * speed['data_wait_share']:.0f}%{mfu}"
        )

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
        counts = sorted(skips.items(), key=lambda item: -item[1])
        causes = ", ".join(f"{count} {cause}" for cause, count in counts)
        skipped = f"skipped {sum(skips.values())} samples: {causes}" if counts else "no sample skipped"
        logger.info("epoch %d done (%s samples), %s", self._epoch + 1, f"{self._epoch_images:,}", skipped)

    def evaluation(self, samples_seen: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        if not self._active or not metrics:
            return
        scalars = {f"val/{name}": value for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.write("val", samples_seen, scalars, {"epoch": epoch, **metrics})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "num_samples")
        logger.info("validation after %s samples: %s", f"{samples_seen:,}", shown)
        self.last |= {f"val_{name}": value for name, value in metrics.items()}

    def captions(self, samples_seen: int, images: Tensor, true: list[str], generated: list[str]) -> None:
        """A contact sheet of images, uint8 `(B, 3, H, W)`, with the generated and the true caption of each."""
        if not self._active or not self._config.trackers:  # results.jsonl shows no images
            return
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        cells = [Captioned(*cell) for cell in zip(pictures, generated, true, strict=True)]
        sheet = contact_sheet(cells, columns=min(4, len(cells)))
        rows = "\n".join(f"| {b} | {a} |" for a, b in zip(true, generated, strict=True))
        for tracker in self._trackers:
            tracker.image("val/captions", sheet, samples_seen)
            tracker.text("val/captions_text", f"| generated | true |\n|---|---|\n{rows}", samples_seen)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The run's flags, next to its last metrics."""
        for tracker in self._trackers:
            tracker.hparams(values, self.last)

    def _end_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        self._end_progress()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

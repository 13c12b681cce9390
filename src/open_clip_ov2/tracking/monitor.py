"""What the training loop reports to: progress line, log lines, TensorBoard, results.jsonl.

Units: `_s` seconds, `memory_mb` mebibytes. The x axis of everything is samples seen.
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
from open_clip_ov2.tracking.progress import ProgressLine
from open_clip_ov2.tracking.sheet import Captioned, contact_sheet
from open_clip_ov2.tracking.sinks import JsonLines, TensorBoard
from open_clip_ov2.tracking.status import StatusFile
from open_clip_ov2.tracking.throughput import BottleneckWatch, Meter, device_memory
from open_clip_ov2.tracking.window import Window, peak_memory_mb

logger = logging.getLogger("open_clip_ov2")


Gather = Callable[[dict[str, int]], dict[str, int]]


@dataclass(frozen=True)
class MonitorConfig:
    """`resumed_at`: samples seen at the checkpoint that the run goes on from (what was written after it is dropped);
    None for a run that begins."""

    run_dir: Path
    rank: int
    world_size: int
    log_every_n_steps: int
    tensorboard: bool
    model_name: str
    device_type: str = "cpu"
    resumed_at: int | None = None


@dataclass(frozen=True)
class StageInfo:
    """`number` counts from 1; `steps` in the whole stage, `first_step` of them done; `batch_images` in one step;
    `workers`: data workers of a process."""

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
    """One run, over all its stages. On ranks other than 0 it counts skipped samples and does nothing else.

    `gather` sums counts over all processes; all call it at the same steps, those that are logged.
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
        self._past_skips: Counter[str] = Counter()  # of all processes, in the epochs before
        self._window = Window()
        self._watch = BottleneckWatch()
        self._sinks: list[Any] = []
        self._progress: ProgressLine | None = None
        self.last: dict[str, float] = {}
        self.status = StatusFile(config.run_dir, self._active)
        if self._active:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            self._sinks.append(JsonLines(config.run_dir / "results.jsonl", config.resumed_at))
            if config.tensorboard:
                self._sinks.append(TensorBoard(config.run_dir / "tensorboard", config.resumed_at))
            self._console = console or Console()

    def begin_stage(self, stage: StageInfo, state: Mapping[str, Any] | None = None) -> None:
        """`state`: this monitor's own, from the checkpoint that the stage goes on from."""
        self._stage, self._steps = stage, stage.first_step
        self._watch.begin(stage.workers)
        if state is not None:
            self.restore(state)
        if not self._active:
            return
        seen = stage.samples_before + stage.first_step * stage.batch_images
        self.status.update(stage=stage.number, stages=stage.of, samples_seen=seen, total_samples=stage.last_sample)
        for sink in self._sinks:
            sink.begin_stage(stage.number, stage.title, stage.samples_before)
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self._console.is_terminal and stage.steps:
            where = f"stage {stage.number}/{stage.of} {stage.title}" if stage.of > 1 else ""
            title = f"{self._config.model_name} {where}".strip()
            self._progress = ProgressLine(title, stage.last_sample, self._console)

    def state(self) -> dict[str, Any]:
        """For a checkpoint. What this epoch's samples were skipped for is in the data's own state."""
        return {"total_skips": dict(self._past_skips), "epoch_images": self._epoch_images}

    def restore(self, state: Mapping[str, Any]) -> None:
        """`state()` of the run that this one goes on from."""
        self._past_skips = Counter(state["total_skips"])
        self._epoch_images = state["epoch_images"]

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_epoch(self, epoch: int, resumed: bool = False, skips: Mapping[str, int] | None = None) -> None:
        """`resumed`: the epoch goes on where another process left it, with so many `skips`."""
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
        """After every optimizer step. Tensors are read (and waited for) at a log step alone."""
        self._epoch_skips.update(skipped)
        self._steps += 1
        skips = self._past_skips + Counter(self._gather(dict(self._epoch_skips))) if self._logs() else Counter()
        if not self._active:
            return
        self._epoch_images += num_images
        self._window.add(num_images, num_tokens, wait_s, step_s)
        if self._logs():
            self._log_step(samples_seen, losses, lr, grad_norm, skips)
        if self._progress is not None:
            self._progress.update(samples_seen, self.last.get("images_per_second"), self.last.get("loss"))

    def _logs(self) -> bool:
        return self._steps in (1, self._stage.steps) or self._steps % self._config.log_every_n_steps == 0

    def _log_step(
        self,
        samples_seen: int,
        losses: Mapping[str, Tensor | float],
        lr: float,
        grad_norm: Tensor | float | None,
        skips: Mapping[str, int],
    ) -> None:
        asked = time.perf_counter()
        values = {name: float(value) for name, value in losses.items()} | {"lr": lr}
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        self._window.add_seconds(time.perf_counter() - asked)
        seconds = self._window.seconds
        speed = self._window.take(self._stage.meter)
        memory_mb = peak_memory_mb(self._config.device_type)
        self.last = values | speed
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"throughput/{name}": value for name, value in speed.items()}
        scalars |= {"memory/peak_mb": memory_mb, "run/stage": float(self._stage.number)}
        scalars |= {f"data/skipped/{cause}": float(count) for cause, count in skips.items()}
        row = {"step": self._steps, "epoch": self._epoch, **values, **speed, "memory_mb": memory_mb}
        for sink in self._sinks:
            sink.write("train", samples_seen, scalars, row)
        self.status.update(
            samples_seen=samples_seen, loss=values.get("loss"), images_per_second=speed["images_per_second"]
        )
        logger.info(self._line(samples_seen, values, speed, losses), extra={FILE_ONLY: self._progress is not None})
        advice = self._watch.note(speed, seconds, device_memory(self._config.device_type))
        if advice is not None:
            logger.warning("%s", advice)

    def _line(
        self, samples_seen: int, values: Mapping[str, float], speed: Mapping[str, float], losses: Iterable[str]
    ) -> str:
        total = self._stage.last_sample
        shown = " ".join(f"{name} {values[name]:.4g}" for name in [*losses, "lr", "grad_norm"] if name in values)
        used = f", utilisation {100 * speed['utilisation']:.1f}%" if "utilisation" in speed else ""
        return (
            f"samples {samples_seen:,} of {total:,} ({100 * samples_seen / max(total, 1):.0f}%) {shown} "
            f"{speed['images_per_second']:.1f} images/s, waiting for data {100 * speed['data_wait_share']:.0f}%{used}"
        )

    @property
    def epoch_skips(self) -> dict[str, int]:
        """Samples skipped by this process's workers since the epoch began, by cause."""
        return dict(self._epoch_skips)

    def end_epoch(self, skips: Mapping[str, int]) -> None:
        """Says what was skipped, over all processes."""
        self._past_skips.update(skips)
        self._epoch_skips.clear()
        if not self._active:
            return
        counts = sorted(skips.items(), key=lambda item: -item[1])
        causes = ", ".join(f"{count} {cause}" for cause, count in counts)
        said = f"skipped {sum(skips.values())} samples: {causes}" if counts else "no sample skipped"
        logger.info("epoch %d done (%s samples), %s", self._epoch + 1, f"{self._epoch_images:,}", said)

    def evaluation(self, samples_seen: int, epoch: int, metrics: Mapping[str, float]) -> None:
        if not self._active or not metrics:
            return
        scalars = {f"val/{name}": value for name, value in metrics.items()}
        for sink in self._sinks:
            sink.write("val", samples_seen, scalars, {"epoch": epoch, **metrics})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "num_samples")
        logger.info("validation after %s samples: %s", f"{samples_seen:,}", shown)
        self.last |= {f"val_{name}": value for name, value in metrics.items()}

    def captions(self, samples_seen: int, images: Tensor, true: list[str], generated: list[str]) -> None:
        """A strip of pictures, uint8 `(B, 3, H, W)`, with the caption generated and the true one."""
        boards = [sink for sink in self._sinks if isinstance(sink, TensorBoard)]
        if not boards:
            return
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        cells = [Captioned(*cell) for cell in zip(pictures, generated, true, strict=True)]
        rows = "\n".join(f"| {b} | {a} |" for a, b in zip(true, generated, strict=True))
        for board in boards:
            board.image("val/captions", contact_sheet(cells, columns=min(4, len(cells))), samples_seen)
            board.text("val/captions_text", f"| generated | true |\n|---|---|\n{rows}", samples_seen)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """The run's flags beside its last figures, for TensorBoard's hparams tab."""
        for sink in self._sinks:
            if isinstance(sink, TensorBoard):
                sink.hparams(values, self.last)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        for sink in self._sinks:
            sink.close()
        self._sinks = []

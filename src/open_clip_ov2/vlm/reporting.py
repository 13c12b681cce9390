"""Between a stage's trainer and the run: metrics, signals that all ranks agree on, and checkpoints that are complete.

A checkpoint of transformers' Trainer is a folder that fills up file by file, on all ranks. COMPLETE is written into it
last, and older ones are removed after that, so that the newest complete one is always whole.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from open_clip_ov2.errors import RunFailed
from open_clip_ov2.files import write_json
from open_clip_ov2.tracking.monitor import RunMonitor, StageInfo
from open_clip_ov2.train.signals import Agreement, StopSignals
from open_clip_ov2.vlm.vlm_folder import COMPLETE, complete_checkpoints
from open_clip_ov2.vlm.vlm_recipe import TOWER

STOP, SAVE = 0, 1
MAX_BAD_STEPS = 3  # ours: so many steps in a row without a finite loss end the run


class RunWatch(TrainerCallback):
    """`stopped` names the signal that ended the stage early."""

    def __init__(
        self, monitor: RunMonitor, signals: StopSignals, agreement: Agreement, stage: StageInfo, batch: int,
        save_every_minutes: float | None,
    ) -> None:  # fmt: skip
        self._monitor, self._signals, self._agreement = monitor, signals, agreement
        self._stage, self._batch = stage, batch
        self._minutes, self._last_save = save_every_minutes, time.monotonic()
        self._step_began = time.perf_counter()
        self._bad, self._tokens = 0, 0.0
        self._tower_lr: dict[str, float] = {}
        self.wait_s = 0.0  # of this step, for data; the trainer adds to it
        self.stopped: str | None = None

    def _samples(self, step: int) -> int:
        return self._stage.samples_before + step * self._batch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step_began = time.perf_counter() - self.wait_s

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        rates = {group["part"]: float(group["lr"]) for group in optimizer.param_groups}
        self._tower_lr = {"tower_lr": rates[TOWER]} if TOWER in rates else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        finished = state.global_step >= state.max_steps
        flags = [int(self._signals.name is not None), int(self._save_time_is_up())]
        agreed = self._agreement.close() if finished else self._agreement.exchange(flags)
        control.should_save = not finished and bool(control.should_save or agreed[STOP] or agreed[SAVE])
        if agreed[STOP] and not finished:
            self.stopped = self._signals.name or "a signal to another rank"
            control.should_training_stop = True
            self._agreement.close()

    def _save_time_is_up(self) -> bool:
        if self._minutes is None or time.monotonic() - self._last_save < 60 * self._minutes:
            return False
        self._last_save = time.monotonic()
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        loss, tokens = logs["loss"], logs.get("num_tokens", 0.0)
        self._bad = 0 if math.isfinite(loss) else self._bad + 1
        if self._bad >= MAX_BAD_STEPS:
            raise RunFailed(
                f"stage {self._stage.number}: the loss was not finite in {self._bad} steps in a row, the last of them "
                f"{state.global_step:,}; lower its lr in the recipe"
            )
        self._monitor.step(
            self._samples(state.global_step),
            losses={"loss": loss, "token_accuracy": logs["mean_token_accuracy"], **self._tower_lr},
            lr=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            num_images=self._batch,
            num_tokens=max(0.0, tokens - self._tokens),
            wait_s=self.wait_s,
            step_s=time.perf_counter() - self._step_began,
            skipped={},
        )
        self._tokens, self.wait_s = tokens, 0.0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer has written its files on this rank; when all have, the checkpoint counts."""
        self._last_save = time.monotonic()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        about = {"step": state.global_step, "samples_seen": self._samples(state.global_step)}
        write_json(folder / f"checkpoint-{state.global_step}" / COMPLETE, about)
        for path in set(folder.glob("checkpoint-*")) - set(complete_checkpoints(folder)[-1:]):
            shutil.rmtree(path, ignore_errors=True)

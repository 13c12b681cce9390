"""What happens after each optimizer step of a stage, ours or OpenCLIP's: report, guard, validate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from open_clip_ov2.errors import Interrupted
from open_clip_ov2.openclip.run.session import SAVE, STOP, Session
from open_clip_ov2.train.checkpoint import CONFIG_KEY, RESUME_KEY, CheckpointName
from open_clip_ov2.train.guard import StepGuard
from open_clip_ov2.train.random_state import get_random_state
from open_clip_ov2.train.signals import StopSignals
from open_clip_ov2.train.step import StepReport


@dataclass(frozen=True)
class StageParts:
    """What a checkpoint is made of. `config`: see CONFIG_KEY."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: Any
    loader: Any
    config: dict[str, Any]


class UntilSignal:
    """The batches of a validation. After a signal to this process the present batch is the last: `stopped` is true.

    Schedulers signal all processes of a job. A process that is signalled alone waits for the others' validation.
    `note` is called with the number of batches after each of them.
    """

    def __init__(self, loader: Any, signals: StopSignals, note: Callable[[int], None] = lambda batches: None) -> None:
        self._loader, self._signals, self._note = loader, signals, note
        self.stopped = False

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._loader, start=1):
            yield batch
            self._note(number)
            if self._signals.name is not None:
                self.stopped = True
                return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class StageProgress:
    """How far a stage has come. Steps are counted within the stage, samples over the whole run."""

    def __init__(
        self,
        session: Session,
        stage_number: int,
        *,
        steps_per_epoch: int,
        epochs: int,
        global_batch: int,
        steps_done: int,
        bad_in_a_row: int = 0,
    ) -> None:
        self._session = session
        self._options = session.plan.options
        self.stage_number = stage_number
        self.steps_per_epoch, self.epochs, self.global_batch = steps_per_epoch, epochs, global_batch
        self.steps_done = steps_done
        last_good = session.writer.last_good if session.writer else lambda: "see rank 0"
        self._guard = StepGuard(self._options.max_bad_steps, last_good, bad_in_a_row)
        self.validate: Callable[[], Any] | None = None
        self.validated: tuple[int, float] | None = None  # samples seen at the last validation, and its caption loss

    @property
    def samples_seen(self) -> int:
        return self._session.samples_before + self.steps_done * self.global_batch

    @property
    def epochs_done(self) -> int:
        return self.steps_done // self.steps_per_epoch

    @property
    def steps_in_epoch(self) -> int:
        return self.steps_done % self.steps_per_epoch

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.steps_per_epoch * self.epochs

    def after_step(self, report: StepReport, parts: StageParts) -> None:
        """Called on every rank. Raises Interrupted (after saving) and RunFailed (too many bad steps, or not saved)."""
        self.steps_done += 1
        self._session.monitor.step(
            self.samples_seen,
            losses=report.losses,
            lr=report.lr,
            grad_norm=report.grad_norm,
            num_images=self.global_batch,
            num_tokens=report.num_tokens,
            wait_s=report.wait_s,
            step_s=report.step_s,
            skipped=report.skipped,
        )
        self._guard.note(report.bad, report.keys, self.samples_seen)
        if self.steps_in_epoch == 0:
            return  # `end_epoch` validates and saves
        validated = self._validate_if_due()
        flags = self._session.agreement.exchange(
            [int(self._session.signals.name is not None), int(self._save_time_is_up())]
        )
        every = self._options.save_every_steps
        if flags[STOP] or flags[SAVE] or validated or (every and self.steps_done % every == 0):
            self.save(parts)
        if flags[STOP]:
            self._stop()

    def _stop(self) -> None:
        self._session.agreement.close()
        name = self._session.signals.name or "a signal to another rank"
        # Nobody exits before rank 0 has written: a launcher would kill the others.
        self._session.check_saved(f"{name}: stopped at {self.samples_seen:,} samples")
        raise Interrupted(f"{name}: saved at {self.samples_seen:,} samples; the same command resumes the run")

    @property
    def tasks_due(self) -> bool:
        """Whether a validation now runs the tasks of --eval, as it always does at the stage's end."""
        every = self._options.eval_every_samples
        return every is None or self._passed(every) or self.finished

    def _passed(self, every: int | None) -> bool:
        """Whether this step passed a multiple of `every` samples."""
        return every is not None and self.samples_seen // every != (self.samples_seen - self.global_batch) // every

    @property
    def validation_due(self) -> bool:
        """Whether --val-every-samples or --eval-every-samples asks for a validation, whatever --val-frequency says."""
        options = self._options
        ends = self.finished and options.eval_every_samples is not None
        return ends or self._passed(options.val_every_samples) or self._passed(options.eval_every_samples)

    def _validate_if_due(self) -> bool:
        if self.validate is None or not self.validation_due:
            return False
        self.validate()
        return True

    def _save_time_is_up(self) -> bool:
        """--save-every-minutes, by the clock of rank 0."""
        minutes, writer = self._options.save_every_minutes, self._session.writer
        if not (minutes and writer and time.monotonic() - writer.last_saved > 60 * minutes):
            return False
        writer.last_saved = time.monotonic()  # ranks agree a step later, and must not be asked again until then
        return True

    def end_epoch(self, parts: StageParts, save_frequency: int) -> None:
        """After the epoch's validation: save if it is time to, as it always is at the stage's end."""
        self._session.agreement.close()
        self._guard.check()
        # In epochs of one or two steps this is the only place where ranks agree on a signal.
        stop = not self.finished and self._session.agreement.now(self._session.signals.name is not None)
        every = self._options.save_every_steps
        due = (save_frequency > 0 and self.epochs_done % save_frequency == 0) or (
            every and self.steps_done % every == 0
        )
        if stop or self.finished or due or self._session.agreement.now(self._save_time_is_up()):
            self.save(parts)
        if stop:
            self._stop()

    def save(self, parts: StageParts) -> None:
        """Rank 0 gathers the random state and data position of every rank, and writes."""
        self._guard.check()
        session = self._session
        own = {"random": get_random_state(session.device), "data": parts.loader.state()}
        ranks: list[Any] = [own]
        if session.world_size > 1:
            ranks = [None] * session.world_size
            torch.distributed.gather_object(own, ranks if session.rank == 0 else None)
        if session.writer is None:
            return
        name = CheckpointName(self.stage_number, self.finished, 0 if self.finished else self.samples_seen)
        content = {
            "epoch": self.epochs_done,
            "name": session.plan.name,
            "state_dict": parts.model.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            CONFIG_KEY: parts.config,
            RESUME_KEY: {
                "format": 1,
                "stage": self.stage_number,
                "stage_done": self.finished,
                "samples_seen": self.samples_seen,
                "stage_samples": self.steps_done * self.global_batch,
                "global_batch": self.global_batch,
                "bad_in_a_row": self._guard.in_a_row,
                "monitor": session.monitor.state(),
                "ranks": ranks,
            },
        }
        if parts.scaler is not None:
            content["scaler"] = parts.scaler.state_dict()
        at, loss = self.validated or (-1, None)
        session.writer.save(name, content, loss if at == self.samples_seen else None)

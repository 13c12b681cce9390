"""What happens after each optimizer step of a stage, ours or OpenCLIP's: report, guard, validate, save, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from open_clip_ov2.errors import Interrupted
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.run.finetune import checkpoint_weights
from open_clip_ov2.openclip.run.session import SAVE, STOP, Session
from open_clip_ov2.openclip.run.stage_costs import stage_meter
from open_clip_ov2.tracking.monitor import StageInfo
from open_clip_ov2.train.checkpoint import CONFIG_KEY, RESUME_KEY, CheckpointName
from open_clip_ov2.train.ema import WeightAverage
from open_clip_ov2.train.guard import StepGuard
from open_clip_ov2.train.parallel import Whole
from open_clip_ov2.train.random_state import get_random_state, set_random_state
from open_clip_ov2.train.sharded import Write
from open_clip_ov2.train.step import StepReport

logger = logging.getLogger("open_clip_ov2")


class StageProgress:
    """How far a stage has come. Steps are counted within the stage, samples over the whole run. An entry of the
    schedule has `global_batch` images. A step has one, or several with --tokens-per-step. `state` is the training state
    in the checkpoint that the stage resumes from; data and random states go back to it. `config`: see CONFIG_KEY."""

    def __init__(
        self,
        session: Session,
        stage: StagePlan,
        state: dict[str, Any] | None,
        *,
        parallel: Whole,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        loader: Any,
        config: dict[str, Any],
        average: WeightAverage | None = None,
    ) -> None:
        self._session, self._options, self._stage = session, session.plan.options, stage
        self.optimizer, self._scaler, self._loader = optimizer, scaler, loader
        self._config, self.average, self._parallel = config, average, parallel
        self.global_batch = stage.args.batch_size * stage.args.accum_freq * session.world_size
        self._entries_per_epoch = loader.num_batches // stage.args.accum_freq
        self._entries = self._entries_per_epoch * stage.args.epochs
        self.entries_done = state["stage_samples"] // self.global_batch if state else 0
        self.steps_done = state.get("stage_steps", self.entries_done) if state else 0
        self._step_samples = 0  # of the last step
        last_good = session.writer.last_good if session.writer else lambda: "see rank 0"
        self._guard = StepGuard(self._options.max_bad_steps, last_good, state["bad_in_a_row"] if state else 0)
        self.validate: Callable[[], Any] | None = None
        self.validated: tuple[int, float] | None = None  # samples seen at the last validation, and its caption loss
        session.monitor.begin_stage(self._info(), state["monitor"] if state else None)
        if state is not None:
            self._restore(state["ranks"])

    def _info(self) -> StageInfo:
        session, stage, on_rank_0 = self._session, self._stage, self._session.rank == 0
        return StageInfo(
            number=stage.number,
            of=len(session.plan.stages),
            title=stage.title,
            first_step=self.steps_done,
            first_sample=self.entries_done * self.global_batch,
            samples=self._entries * self.global_batch,
            samples_before=session.samples_before,
            meter=stage_meter(self._parallel.model, stage, session.device, session.world_size) if on_rank_0 else None,
            workers=stage.args.workers,
        )

    def _restore(self, ranks: list[Any]) -> None:
        positions, moved = [rank["data"] for rank in ranks], self._options.override
        if self.entries_in_epoch and not self._loader.resume(positions, moved=moved):
            logger.warning(
                "another number of processes or data workers than before: every sample of this epoch is still seen "
                "once, but their order differs from the uninterrupted run's"
            )
        if len(ranks) == self._session.world_size:
            set_random_state(ranks[self._session.rank]["random"], self._session.device)

    @property
    def samples_seen(self) -> int:
        return self._session.samples_before + self.entries_done * self.global_batch

    @property
    def entries_in_epoch(self) -> int:
        return self.entries_done % self._entries_per_epoch

    @property
    def finished(self) -> bool:
        return self.entries_done >= self._entries

    def after_step(self, report: StepReport) -> None:
        """On every rank. Raises Interrupted (after saving), RunFailed (too many bad steps, or not saved), and on rank 0
        alone InUse."""
        self.steps_done += 1
        self.entries_done += report.entries
        self._step_samples = report.entries * self.global_batch
        if self.average is not None:
            self.average.update()
        self._session.check_lock()
        measured = {name: value for name, value in vars(report).items() if name not in ("bad", "keys", "entries")}
        self._session.monitor.step(self.samples_seen, num_images=self._step_samples, **measured)
        self._guard.note(report.bad, report.keys, self.samples_seen)
        if self.entries_in_epoch == 0:
            return  # `end_epoch` validates and saves
        validate = self.validate if self.validation_due else None
        if validate is not None:
            validate()
        signalled = int(self._session.signals.name is not None)
        flags = self._session.agreement.exchange([signalled, int(self._save_time_is_up())])
        if flags[STOP] or flags[SAVE] or validate is not None or self._save_step:
            self._save()
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
        return every is not None and self.samples_seen // every != (self.samples_seen - self._step_samples) // every

    @property
    def validation_due(self) -> bool:
        """Whether --val-every-samples or --eval-every-samples asks for a validation, whatever --val-frequency says."""
        options = self._options
        ends = self.finished and options.eval_every_samples is not None
        return ends or self._passed(options.val_every_samples) or self._passed(options.eval_every_samples)

    @property
    def _save_step(self) -> bool:
        every = self._options.save_every_steps
        return every is not None and self.steps_done % every == 0

    def _save_time_is_up(self) -> bool:
        """--save-every-minutes, by the clock of rank 0."""
        minutes, writer = self._options.save_every_minutes, self._session.writer
        if not (minutes and writer and time.monotonic() - writer.last_saved > 60 * minutes):
            return False
        writer.last_saved = time.monotonic()  # ranks agree a step later, and must not be asked again until then
        return True

    def end_epoch(self) -> None:
        """After the epoch's validation: save if it is time to, as it always is at the stage's end."""
        agreement, args = self._session.agreement, self._stage.args
        asked = agreement.close()[SAVE]  # at the step before, whose answer no other step waits for
        self._guard.check()
        # In epochs of one or two steps this is the only place where ranks agree on a signal.
        stop = not self.finished and agreement.now(self._session.signals.name is not None)
        due = args.save_most_recent or (args.save_frequency > 0 and self._epochs_done % args.save_frequency == 0)
        if stop or self.finished or due or asked or self._save_step or agreement.now(self._save_time_is_up()):
            self._save()
        if stop:
            self._stop()

    @property
    def _epochs_done(self) -> int:
        return self.entries_done // self._entries_per_epoch

    def _trained(self) -> tuple[CheckpointName, dict[str, Any], Write | None]:
        """Name, weights and optimizer of a checkpoint now, and what writes it: by default the writer, one file."""
        number, shards = self._stage.number, self._session.shards
        if self.finished or shards is None:  # a stage ends with a file that any tool opens
            name = CheckpointName(number, self.finished, 0 if self.finished else self.samples_seen)
            return name, self._parallel.read(checkpoint_weights, self.average, self.optimizer), None
        name = CheckpointName(number, False, self.samples_seen, "dcp")
        return name, *shards.begin(name.file, self._parallel.shards(self.average, self.optimizer))

    def _save(self) -> None:
        """Rank 0 gathers the random state and data position of every rank, and writes."""
        self._guard.check()
        session = self._session
        own: Any = {"random": get_random_state(session.device), "data": self._loader.state()}
        ranks = [own] * session.world_size
        if session.world_size > 1:
            torch.distributed.gather_object(own, ranks if session.rank == 0 else None)
        name, trained, write = self._trained()
        if session.writer is None:
            return
        session.check_lock()
        content = {
            "epoch": self._epochs_done,
            "name": session.plan.name,
            **trained,
            CONFIG_KEY: self._config,
            RESUME_KEY: {
                "format": 1,
                "stage": self._stage.number,
                "stage_done": self.finished,
                "samples_seen": self.samples_seen,
                "stage_samples": self.entries_done * self.global_batch,
                "stage_steps": self.steps_done,
                "global_batch": self.global_batch,
                "config": session.plan.config,
                "bad_in_a_row": self._guard.in_a_row,
                "monitor": session.monitor.state(),
                "ranks": ranks,
            },
        }
        if self._scaler is not None:
            content["scaler"] = self._scaler.state_dict()
        at, loss = self.validated or (-1, None)
        session.writer.save(name, content, loss if at == self.samples_seen else None, write)

"""One stage: OpenCLIP's own `main` runs, with our pieces under the names that patches.RUN lists.

`main` makes the model, the optimizer, the data and the loss through the replacements below, then calls
`train_one_epoch` and `evaluate` for each epoch. After every optimizer step `StageProgress.after_step` reports,
validates, saves and stops.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip_train.main as open_clip_main
import torch
from torch import nn

from open_clip_ov2.data.receive import worker_death
from open_clip_ov2.errors import RunFailed, UserError
from open_clip_ov2.evaluate.gathering import gathered_counts
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.run import baselines, optimizers
from open_clip_ov2.openclip.run.finetune import checkpoint_weights
from open_clip_ov2.openclip.run.loaders import LoaderInfo, make_data
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.openclip.run.stage_progress import StageProgress
from open_clip_ov2.openclip.run.validation import SETS, Validation, imagenet_evaluations
from open_clip_ov2.train.checkpoint import average_of, live_weights, snapshot
from open_clip_ov2.train.ema import WeightAverage
from open_clip_ov2.train.step import StepSettings, train_epoch

logger = logging.getLogger("open_clip_ov2")

VALIDATIONS = ("val", *SETS)  # entries of OpenCLIP's `data` that `evaluate` looks at


class StageRun:
    """One call of OpenCLIP's `main`. Its methods are the replacements of the names in patches.RUN."""

    def __init__(self, session: Session, stage: StagePlan) -> None:
        self.session = session
        self.stage = stage
        self.options = stage.options
        self.is_ov2 = session.plan.is_ov2
        self.built = StageModel(session, stage)
        self._progress: StageProgress | None = None  # from the first step on
        self._loader: Any = None
        self._settings: StepSettings | None = None

    def run(self) -> None:
        """Raises UserError, RunFailed, Interrupted."""
        argv = self.stage.main_argv(by_block=self.is_ov2 or self.session.layout is not None)
        # With `--resume latest` it accepts the folder, and asks what to load.
        argv += ["--resume", "latest", "--name", self.session.plan.name]
        try:
            with patches.run_patches(self.replacements()):
                result = open_clip_main.main(argv)
        except RuntimeError as error:  # torch reports a dead data worker wherever the main thread happens to be
            death = worker_death(error)
            if death is None:
                raise
            raise death from error
        finally:
            if self._loader is not None:
                self._loader.close()
        progress = self._progress
        if progress is not None and not progress.finished:
            raise RunFailed(
                f"the stage ended at {progress.samples_seen:,} samples, before its end: its epochs have another "
                "length in this configuration (--override); start another run (--name)"
            )
        if result == -1:
            raise UserError("OpenCLIP's main stopped with an error; its message is above")
        if progress is None and self._loader is not None:  # OpenCLIP's loop had no epoch left
            assert self.session.checkpoint is not None
            raise RunFailed(
                f"{self.session.plan.folder}: epoch {self.session.checkpoint['epoch']} of stage {self.stage.number} "
                f"is done, and --epochs is {self.stage.args.epochs}, so nothing was trained; give more --epochs, or "
                "start another run (--name)"
            )
        if progress is not None:
            self.session.samples_before = progress.samples_seen
            if self.stage.number < len(self.session.plan.stages):
                optimizer = progress.optimizer if self.session.plan.carry_optimizer else None
                state = self.built.parallel.read(checkpoint_weights, progress.average, optimizer, everywhere=True)
                self.session.checkpoint = snapshot(state)

    def replacements(self) -> dict[tuple[str, str], Callable[[Any], Any]]:
        """For each name of patches.RUN a function from the original to what takes its place."""
        main = patches.MAIN
        return {
            (main, "init_distributed_device"): lambda _: self.session.enter_main,
            (main, "setup_logging"): lambda _: lambda *args, **kwargs: None,
            (main, "create_model_and_transforms"): self.built.create_model,
            (main, "get_tokenizer"): self.built.get_tokenizer,
            (main, "get_latest_checkpoint"): lambda _: lambda *args, **kwargs: self.session.state_within and "found",
            (main, "pt_load"): lambda _: self.built.load_checkpoint,
            (main, "get_data"): lambda _: self.get_data,
            (main, "create_loss"): lambda original: partial(self.create_loss, original),
            (main, "train_one_epoch"): lambda original: partial(self.train_one_epoch, original),
            (main, "evaluate"): self._replace_evaluate,
            (main, "optim"): self.built.optim,
            ("timm.optim", "create_optimizer_v2"): self.built.timm_optimizer,
            ("open_clip_train.train", "maybe_compute_generative_loss"): lambda _: lambda model_out: None,
            ("torch.nn.parallel", "DistributedDataParallel"): self.built.distribute,
        }

    def get_data(
        self, args: argparse.Namespace, transforms: tuple[Any, Any], epoch: int = 0, tokenizer: Any = None
    ) -> dict[str, LoaderInfo]:
        data = make_data(args, transforms, tokenizer, self.options, epoch, self.session.plan.options.stall_warning)
        self._loader = data["train"].dataloader if "train" in data else None
        if "val" in data and self._loader is not None:  # before hours of training, not after
            self.session.on_rank_0(data["val"].dataloader.check)
        data |= {flag: LoaderInfo(options) for flag, options in imagenet_evaluations(args).items()}
        self._config = self.built.own_config()
        if self.session.rank == 0:
            self._config.write(self.session.plan.folder)
        return data

    def create_loss(self, original: Callable[..., nn.Module], args: argparse.Namespace) -> nn.Module:
        if not self.is_ov2:
            return baselines.RecordedLoss(original(args), self.built.model, args)
        return self.built.caption_loss(args)

    def train_one_epoch(
        self, original: Callable[..., None], model: nn.Module, data: dict[str, Any], loss: Any, epoch: int,
        optimizer: Any, scaler: Any, scheduler: Any, dist_model: Any, args: argparse.Namespace, tb_writer: Any = None,
    ) -> None:  # fmt: skip
        args.save_logs = False  # `main` would write checkpoints of its own
        loader, monitor = data["train"].dataloader, self.session.monitor
        progress = self._progress = self._progress or self._begin(loader, optimizer, scaler)
        if "val" in data:
            progress.validate = lambda: self._validate(model, {"val": data["val"]}, epoch, args)
        done = progress.entries_in_epoch
        if not done:
            loader.set_epoch(epoch)
        monitor.start_epoch(epoch, resumed=done > 0, skips=loader.skips if done else {})
        scheduler = scheduler and optimizers.scaled_schedule(scheduler, optimizer)
        if self.is_ov2:
            before_step = (lambda: None) if args.skip_scheduler else (lambda: scheduler(progress.entries_done))
            self._settings = self._settings or self.built.step_settings(args)
            train_epoch(model, loader, loss, optimizer, scaler, self._settings, before_step, progress.after_step)
        else:
            resumed = scheduler and (lambda step: scheduler(step + done))
            baselines.stock_epoch(
                original, model, loader, loss, epoch, optimizer, scaler, resumed, dist_model, args,
                after_step=progress.after_step,
            )  # fmt: skip
        monitor.end_epoch(gathered_counts(monitor.epoch_skips))
        if not any(split in data for split in VALIDATIONS):  # otherwise `main` calls `evaluate` next
            progress.end_epoch()

    def _begin(self, loader: Any, optimizer: torch.optim.Optimizer, scaler: Any) -> StageProgress:
        """Before the first step in this process: put everything back to where the stage was stopped."""
        session, state = self.session, self.session.state_within
        progress = StageProgress(
            session,
            self.stage,
            state,
            parallel=self.built.parallel,
            optimizer=optimizer,
            scaler=scaler,
            loader=loader,
            config=self._config.carried(),
            average=self._average(),
        )
        if state is None and session.plan.carry_optimizer and session.checkpoint is not None:
            optimizers.carry_optimizer(optimizer, self.built.parallel.place_optimizer(session.checkpoint["optimizer"]))
        session.checkpoint = None  # as large as the model
        return progress

    def _average(self) -> WeightAverage | None:
        decay, checkpoint = self.options.ema_decay, self.session.checkpoint
        if decay is None:
            return None
        logger.info(
            "--ema-decay %g: checkpoints hold the averaged weights, which are what `ov2 eval`, `caption`, `export` and "
            "--pretrained open; validations are of them too, and live_* are metrics of the weights without averaging",
            decay,
        )
        begin = self.built.averages  # of the stage before
        if self.session.state_within and checkpoint is not None:
            begin = {**live_weights(checkpoint), **average_of(checkpoint)}
        return WeightAverage(self.built.model, decay, begin and self.built.parallel.place_weights(begin))

    def _replace_evaluate(self, original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        self._validation = Validation(self.session, self.built, original)
        return self.evaluate

    def evaluate(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, tb_writer: Any = None,
        tokenizer: Any = None,
    ) -> dict[str, float]:  # fmt: skip
        progress, metrics, last = self._progress, {}, epoch == args.epochs or "train" not in data
        val, zero_shot = (
            every and (epoch % every == 0 or last) for every in (args.val_frequency, args.zeroshot_frequency)
        )
        due = {"val": val or (progress is not None and progress.validation_due), **dict.fromkeys(SETS, zero_shot)}
        if seen := {split: data[split] for split in data if due.get(split)}:
            metrics = self._validate(model, seen, epoch, args)
        if "train" in data and progress is not None:
            progress.end_epoch()
        return metrics

    def _validate(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace
    ) -> dict[str, float]:
        progress = self._progress
        with self.built.parallel.readable(model, progress.average if progress else None) as (model, average):
            if progress is None:  # without training
                return self._validation.run(model, data, epoch, args, 0, tasks=True)
            seen, tasks = progress.samples_seen, progress.tasks_due
            metrics = self._validation.run(model, data, epoch, args, seen, tasks, average)
        loss = metrics.get("caption_loss", metrics.get("clip_val_loss"))
        if loss is not None:
            progress.validated = (progress.samples_seen, loss)
        return metrics

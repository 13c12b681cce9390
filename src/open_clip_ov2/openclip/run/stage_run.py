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
from open_clip import CoCa
from torch import nn

from open_clip_ov2.argv import without
from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.receive import worker_death
from open_clip_ov2.errors import RunFailed, UserError
from open_clip_ov2.evaluate.gathering import gathered_counts
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.tokenizer import eos_id_of
from open_clip_ov2.openclip.run import baselines, optimizers
from open_clip_ov2.openclip.run.loaders import LoaderInfo, make_data
from open_clip_ov2.openclip.run.run_folder import own_config
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_costs import stage_meter
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.openclip.run.stage_progress import StageParts, StageProgress
from open_clip_ov2.openclip.run.validation import Validation
from open_clip_ov2.tracking.monitor import StageInfo
from open_clip_ov2.train.checkpoint import RESUME_KEY, snapshot
from open_clip_ov2.train.random_state import set_random_state
from open_clip_ov2.train.step import StepSettings, train_epoch

logger = logging.getLogger("open_clip_ov2")
VALIDATIONS = ("val", "imagenet-val", "imagenet-v2")  # entries of OpenCLIP's `data` that `evaluate` looks at


class StageRun:
    """One call of OpenCLIP's `main`. Its methods are the replacements of the names in patches.RUN."""

    def __init__(self, session: Session, stage: StagePlan, checkpoint: dict[str, Any] | None) -> None:
        """`checkpoint`: from within this stage, to resume from."""
        self.session = session
        self.stage = stage
        self.options = stage.options
        self.is_ov2 = session.plan.is_ov2
        self.built = StageModel(session, stage, checkpoint)
        self._checkpoint = checkpoint
        self._progress: StageProgress | None = None  # from the first step on
        self._loader: Any = None

    def run(self) -> None:
        """Raises UserError, RunFailed, Interrupted."""
        try:
            with patches.run_patches(self.replacements()):
                result = open_clip_main.main(self._argv())
        except RuntimeError as error:  # torch reports a dead data worker wherever the main thread happens to be
            death = worker_death(error)
            if death is None:
                raise
            raise death from error
        finally:
            if self._loader is not None:
                self._loader.close()
        if self._progress is not None and not self._progress.finished:
            raise RunFailed(
                f"the stage ended at {self._progress.samples_seen:,} samples, before its end: its epochs have another "
                "length in this configuration (--override); start another run (--name)"
            )
        if result == -1:
            raise UserError("OpenCLIP's main stopped with an error; its message is above")

    @property
    def samples_seen(self) -> int:
        """Samples seen in the whole run."""
        return self._progress.samples_seen if self._progress else self.session.samples_before

    def _argv(self) -> list[str]:
        """The stage's flags for `main`. With `--resume latest` it accepts the folder, and asks what to load."""
        argv = without(self.stage.argv, ("--report-to", "--resume", "--name"))
        argv = [word for word in argv if not (self.is_ov2 and word == "--torchcompile")]  # StageModel compiles blocks
        return [*argv, "--resume", "latest", "--name", self.session.plan.name]

    def replacements(self) -> dict[tuple[str, str], Callable[[Any], Any]]:
        """For each name of patches.RUN a function from the original to what takes its place."""
        main = "open_clip_train.main"
        return {
            (main, "init_distributed_device"): lambda _: self.session.enter_main,
            (main, "setup_logging"): lambda _: lambda *args, **kwargs: None,
            (main, "create_model_and_transforms"): self.built.create_model,
            (main, "get_tokenizer"): self.built.get_tokenizer,
            (main, "get_latest_checkpoint"): lambda _: lambda *args, **kwargs: "found" if self._checkpoint else None,
            (main, "pt_load"): lambda _: self.built.load_checkpoint,
            (main, "get_data"): lambda _: self.get_data,
            (main, "create_loss"): self.create_loss,
            (main, "train_one_epoch"): self.train_one_epoch,
            (main, "evaluate"): self.evaluate,
            (main, "optim"): self.built.optim,
            ("timm.optim", "create_optimizer_v2"): optimizers.muon_for_hidden_matrices,
            ("open_clip_train.train", "maybe_compute_generative_loss"): lambda _: lambda model_out: None,
            ("torch.nn.parallel", "DistributedDataParallel"): partial(
                optimizers.ddp_on_any_device, reduction=self.options.gradient_reduction
            ),
        }

    # --- data and loss -------------------------------------------------------------------------------

    def get_data(
        self, args: argparse.Namespace, transforms: tuple[Any, Any], epoch: int = 0, tokenizer: Any = None
    ) -> dict[str, LoaderInfo]:
        data = make_data(args, transforms, tokenizer, self.options, epoch, self.session.plan.options.stall_warning)
        self._loader = data["train"].dataloader if "train" in data else None
        if "val" in data and self._loader is not None:  # before hours of training, not after
            self.session.on_rank_0(data["val"].dataloader.check)
        for split, path in (("val", args.imagenet_val), ("v2", args.imagenet_v2)):
            if path:
                from open_clip_train.data import get_imagenet

                data[f"imagenet-{split}"] = get_imagenet(args, transforms, split)
        options, preprocess_cfg = self.built.model_options(args), self.built.preprocess_cfg
        self._config = own_config(args, options, preprocess_cfg, self.built.tokenizer)
        if self.session.rank == 0:
            self.session.plan.folder.mkdir(parents=True, exist_ok=True)
            self._config.write(self.session.plan.folder)
        return data

    def create_loss(self, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def create_loss(args: argparse.Namespace) -> nn.Module:
            if self.is_ov2:
                loss = CaptionLoss(label_smoothing=self.options.label_smoothing, z_loss=self.options.z_loss)
                if self.built.compile_blocks:
                    loss.compile_softmax()
                return loss
            weights: dict[str, float] = {}
            if isinstance(self.built.model, CoCa):
                weights["contrastive_loss"] = args.coca_contrastive_loss_weight
                weights["caption_loss"] = args.coca_caption_loss_weight
            off = weights.get("contrastive_loss") == 0
            return baselines.RecordedLoss(original(args), contrastive_off=off, weights=weights)

        return create_loss

    # --- training ------------------------------------------------------------------------------------

    def train_one_epoch(self, original: Callable[..., None]) -> Callable[..., None]:
        def train_one_epoch(
            model: nn.Module, data: dict[str, Any], loss: Any, epoch: int, optimizer: Any, scaler: Any,
            scheduler: Any, dist_model: Any, args: argparse.Namespace, tb_writer: Any = None,
        ) -> None:  # fmt: skip
            args.save_logs = False  # `main` would write checkpoints of its own
            loader, monitor = data["train"].dataloader, self.session.monitor
            progress = self._progress or self._begin(args, loader, optimizer)
            self._parts = parts = StageParts(self.built.model, optimizer, scaler, loader, self._config.carried())
            if "val" in data:
                progress.validate = lambda: self._validate(model, data, epoch, args)
            resumed = progress.steps_in_epoch > 0
            if not resumed:
                loader.set_epoch(epoch)
            monitor.start_epoch(epoch, resumed, skips=loader.skips if resumed else {})
            after_step = partial(progress.after_step, parts=parts)
            if self.is_ov2:
                before_step = (lambda: None) if args.skip_scheduler else (lambda: scheduler(progress.steps_done))
                weight = args.coca_caption_loss_weight
                settings = StepSettings(self._compute(args), args.accum_freq, args.grad_clip_norm, weight)
                train_epoch(model, loader, loss, optimizer, scaler, settings, before_step, after_step)
            else:
                feed = baselines.StockFeed(loader, args.accum_freq, loss, optimizer, model, after_step)
                stock_args = (model, loss, epoch, optimizer, scaler, scheduler, dist_model)
                steps_done = progress.steps_in_epoch
                baselines.stock_epoch(original, feed, *stock_args, steps_done=steps_done, run_args=args)
            monitor.end_epoch(gathered_counts(monitor.epoch_skips))
            if not any(split in data for split in VALIDATIONS):  # otherwise `main` calls `evaluate` next
                self._end_epoch(args)

        return train_one_epoch

    def _begin(self, args: argparse.Namespace, loader: Any, optimizer: torch.optim.Optimizer) -> StageProgress:
        """Before the first step in this process: put everything back to where the stage was stopped."""
        session, state = self.session, self._checkpoint and self._checkpoint[RESUME_KEY]
        global_batch = args.batch_size * args.accum_freq * args.world_size
        self._progress = progress = StageProgress(
            session,
            self.stage.number,
            steps_per_epoch=loader.num_batches // args.accum_freq,
            epochs=args.epochs,
            global_batch=global_batch,
            steps_done=state["stage_samples"] // global_batch if state else 0,
            bad_in_a_row=state["bad_in_a_row"] if state else 0,
        )
        session.monitor.begin_stage(
            StageInfo(
                number=self.stage.number,
                of=len(session.plan.stages),
                title=self.stage.title,
                first_step=progress.steps_done,
                steps=progress.steps_per_epoch * args.epochs,
                samples_before=session.samples_before,
                batch_images=global_batch,
                meter=stage_meter(self.built.model, args) if session.rank == 0 else None,
                workers=args.workers,
            ),
            state["monitor"] if state else None,
        )
        if state is not None:
            self._restore(state, loader, progress)
        elif session.plan.carry_optimizer and session.previous_stage is not None:
            optimizers.carry_optimizer(optimizer, session.previous_stage["optimizer"])
        self._checkpoint = session.previous_stage = None  # each as large as the model
        return progress

    def _restore(self, state: dict[str, Any], loader: Any, progress: StageProgress) -> None:
        session, ranks = self.session, state["ranks"]
        positions, moved = [rank["data"] for rank in ranks], session.plan.options.override
        if progress.steps_in_epoch and not loader.resume(positions, moved=moved):
            logger.warning(
                "another number of processes or data workers than before: every sample of this epoch is still seen "
                "once, but their order differs from the uninterrupted run's"
            )
        if len(ranks) == session.world_size:
            set_random_state(ranks[session.rank]["random"], session.device)

    def _end_epoch(self, args: argparse.Namespace) -> None:
        assert self._progress is not None
        self._progress.end_epoch(self._parts, args.save_frequency)
        if self._progress.finished and self.stage.number < len(self.session.plan.stages):
            state = {"state_dict": self.built.model.state_dict()}
            if self.session.plan.carry_optimizer:
                state["optimizer"] = self._parts.optimizer.state_dict()
            self.session.previous_stage = snapshot(state)

    # --- validation ----------------------------------------------------------------------------------

    def evaluate(self, original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        self._stock_evaluate = original

        def evaluate(
            model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, tb_writer: Any = None,
            tokenizer: Any = None,
        ) -> dict[str, float]:  # fmt: skip
            last, metrics = epoch == args.epochs, {}
            due = args.val_frequency and (epoch % args.val_frequency == 0 or last or "train" not in data)
            due = due or (self._progress is not None and self._progress.validation_due)
            if due and set(data) - {"train"}:
                metrics = self._validate(model, data, epoch, args)
            if "train" in data:
                self._end_epoch(args)
            return metrics

        return evaluate

    def _validate(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace
    ) -> dict[str, float]:
        validation = Validation(self.session, self.built, self._stock_evaluate)
        samples_seen = self._progress.samples_seen if self._progress else 0
        tasks = self._progress.tasks_due if self._progress else True
        metrics = validation.run(model, data, epoch, args, self._compute(args), samples_seen, tasks)
        loss = metrics.get("caption_loss", metrics.get("clip_val_loss"))
        if self._progress is not None and loss is not None:
            self._progress.validated = (samples_seen, loss)
        return metrics

    def _compute(self, args: argparse.Namespace) -> Compute:
        return Compute(
            device=torch.device(args.device),
            precision=args.precision,
            world_size=args.world_size,
            eos_id=self.built.model.text_config.eos_id if self.is_ov2 else eos_id_of(self.built.tokenizer),
            mean=tuple(self.built.preprocess_cfg["mean"]),
            std=tuple(self.built.preprocess_cfg["std"]),
        )

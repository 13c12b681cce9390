"""One stage: OpenCLIP's own `main`, with our pieces in the places that patches.RUN lists."""

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

from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.receive import worker_death
from open_clip_ov2.errors import RunFailed, UserError
from open_clip_ov2.evaluate import caption_loss as evaluate
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.command.stage_flags import without
from open_clip_ov2.openclip.models.tokenizer import eos_id_of
from open_clip_ov2.openclip.run import baselines
from open_clip_ov2.openclip.run import optimizers as shims
from open_clip_ov2.openclip.run.loaders import LoaderInfo, make_data
from open_clip_ov2.openclip.run.model_flops import stage_meter
from open_clip_ov2.openclip.run.run_folder import resolved_config, write_config
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.openclip.run.stage_progress import StageParts, StageProgress
from open_clip_ov2.openclip.run.validation import Validation
from open_clip_ov2.tracking.monitor import StageInfo
from open_clip_ov2.train.checkpoint import RESUME_KEY, snapshot
from open_clip_ov2.train.random_state import set_random_state
from open_clip_ov2.train.step import StepSettings, train_epoch

logger = logging.getLogger("open_clip_ov2")


class StageRun:
    """One call of OpenCLIP's `main`. Its methods are the replacements that patches.RUN names."""

    def __init__(self, session: Session, stage: StagePlan, found: dict[str, Any] | None) -> None:
        """`found`: a checkpoint within this stage to go on from."""
        self.session = session
        self.stage = stage
        self.options = stage.options
        self.family = session.plan.family
        self._found = found
        self.built = StageModel(session, stage, found)
        self._progress: StageProgress | None = None
        self._loader: Any = None

    def run(self) -> None:
        """Raises UserError, RunFailed, Interrupted."""
        try:
            with patches.run_patches(self._replacements()):
                result = open_clip_main.main(self._argv())
        except RuntimeError as error:  # torch tells of a dead data worker wherever the main thread happens to be
            death = worker_death(error)
            if death is None:
                raise
            raise death from error
        finally:
            if self._loader is not None:
                self._loader.close()
        if self._progress is not None and not self._progress.finished:
            raise RunFailed(
                f"the stage ended at {self._progress.samples_seen:,} samples, before its end: its epochs do "
                "not fit this configuration (--override); --name another run"
            )
        if result == -1:
            raise UserError("OpenCLIP's main stopped with an error; its message stands above")

    @property
    def samples_seen(self) -> int:
        """Over the whole run."""
        return self._progress.samples_seen if self._progress else self.session.samples_before

    def _argv(self) -> list[str]:
        """TensorBoard is the monitor's; `--resume latest` makes `main` accept the folder and ask what to load."""
        argv = without(self.stage.argv, ("--report-to", "--resume", "--name"))
        argv = [word for word in argv if not (self.family and word == "--torchcompile")]
        return [*argv, "--resume", "latest", "--name", self.session.plan.name]

    def _replacements(self) -> dict[tuple[str, str], Callable[[Any], Any]]:
        main = "open_clip_train.main"
        return {
            (main, "init_distributed_device"): lambda _: self.session.enter_main,
            (main, "setup_logging"): lambda _: lambda *args, **kwargs: None,
            (main, "create_model_and_transforms"): self.built.creates_model,
            (main, "get_tokenizer"): self.built.gets_tokenizer,
            (main, "get_latest_checkpoint"): lambda _: lambda *args, **kwargs: "found" if self._found else None,
            (main, "pt_load"): lambda _: self.built.load,
            (main, "get_data"): lambda _: self._get_data,
            (main, "create_loss"): self._creates_loss,
            (main, "train_one_epoch"): self._trains,
            (main, "evaluate"): self._evaluates,
            (main, "optim"): self.built.optim,
            ("timm.optim", "create_optimizer_v2"): shims.muon_for_hidden_matrices,
            ("open_clip_train.train", "maybe_compute_generative_loss"): lambda _: lambda model_out: None,
            ("torch.nn.parallel", "DistributedDataParallel"): partial(
                shims.ddp_on_any_device, reduction=self.options.gradient_reduction
            ),
        }

    # --- data ----------------------------------------------------------------------------------------

    def _get_data(
        self, args: argparse.Namespace, transforms: tuple[Any, Any], epoch: int = 0, tokenizer: Any = None
    ) -> dict[str, LoaderInfo]:
        data = make_data(args, transforms, tokenizer, self.options, epoch, self.session.plan.options.stall_warning)
        self._loader = data["train"].dataloader if "train" in data else None
        if "val" in data and self._loader is not None:  # before hours of training, not after
            self.session.on_rank_0(data["val"].dataloader.check)
        if args.imagenet_val or args.imagenet_v2:
            from open_clip_train import data as stock_data

            for split, path in (("val", args.imagenet_val), ("v2", args.imagenet_v2)):
                if path:
                    data[f"imagenet-{split}"] = stock_data.get_imagenet(args, transforms, split)
        if self.session.rank == 0:
            model_options = self.built.model_options(args)
            write_config(self.session.plan.folder, resolved_config(args, model_options), self.built.preprocess_cfg)
        return data

    # --- the loop ------------------------------------------------------------------------------------

    def _creates_loss(self, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def create_loss(args: argparse.Namespace) -> nn.Module:
            if self.family:
                loss = CaptionLoss(label_smoothing=self.options.label_smoothing, z_loss=self.options.z_loss)
                if self.built.compile_blocks:
                    loss.compile_softmax()
                return loss
            weights = {
                "contrastive_loss": args.coca_contrastive_loss_weight,
                "caption_loss": args.coca_caption_loss_weight,
            }
            weights = weights if isinstance(self.built.model, CoCa) else {}
            off = weights.get("contrastive_loss") == 0
            return baselines.RecordedLoss(original(args), contrastive_off=off, weights=weights)

        return create_loss

    def _trains(self, original: Callable[..., None]) -> Callable[..., None]:
        def train_one_epoch(
            model: nn.Module, data: dict[str, Any], loss: Any, epoch: int, optimizer: Any, scaler: Any,
            scheduler: Any, dist_model: Any, args: argparse.Namespace, tb_writer: Any = None,
        ) -> None:  # fmt: skip
            args.save_logs = False  # `main` would write checkpoints of its own
            loader, monitor = data["train"].dataloader, self.session.monitor
            if self._progress is None:
                self._begin(args, loader, optimizer)
            progress = self._progress
            assert progress is not None
            parts = StageParts(self.built.model, optimizer, scaler, loader)
            if "val" in data:
                progress.validate = lambda: self._validate(model, data, epoch, args)
            if progress.steps_in_epoch == 0:
                loader.set_epoch(epoch)
            resumed = progress.steps_in_epoch > 0
            monitor.start_epoch(epoch, resumed, skips=loader.skips if resumed else {})
            if self.family:
                before_step = (lambda: None) if args.skip_scheduler else (lambda: scheduler(progress.steps_done))
                settings = StepSettings(
                    self._compute(args), args.accum_freq, args.grad_clip_norm, args.coca_caption_loss_weight
                )
                train_epoch(
                    model, loader, loss, optimizer, scaler, settings, before_step,
                    lambda report: progress.after_step(report, parts),
                )  # fmt: skip
            else:
                feed = baselines.StockFeed(
                    loader, args.accum_freq, loss, optimizer, model,
                    lambda report: progress.after_step(report, parts),
                )  # fmt: skip
                stock_args = (model, loss, epoch, optimizer, scaler, scheduler, dist_model)
                steps_done = progress.steps_in_epoch
                baselines.stock_epoch(original, feed, *stock_args, steps_done=steps_done, run_args=args)
            monitor.end_epoch(evaluate.gathered_counts(monitor.epoch_skips, args.world_size))
            self._parts = parts
            if not any(split in data for split in ("val", "imagenet-val", "imagenet-v2")):
                self._end_epoch(args)

        return train_one_epoch

    def _begin(self, args: argparse.Namespace, loader: Any, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step in this process: where the stage stands, and everything put back to there."""
        session, state = self.session, self._found and self._found[RESUME_KEY]
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
            self._restore(state, loader)
        elif self.session.plan.carry_optimizer and self.session.carried is not None:
            shims.carry_moments(optimizer, self.session.carried["optimizer"])
        self._found = session.carried = None  # as large as the model

    def _restore(self, state: dict[str, Any], loader: Any) -> None:
        session, ranks = self.session, state["ranks"]
        assert self._progress is not None
        if self._progress.steps_in_epoch and not loader.resume(
            [rank["data"] for rank in ranks], moved=session.plan.options.override
        ):
            logger.warning(
                "another number of processes or data workers than before: no sample of this epoch is lost or seen "
                "twice, but their order differs from the uninterrupted run's"
            )
        if len(ranks) == session.world_size:
            set_random_state(ranks[session.rank]["random"], session.device)

    def _end_epoch(self, args: argparse.Namespace) -> None:
        assert self._progress is not None
        self._progress.end_epoch(self._parts, args.save_frequency)
        if self._progress.finished and self.stage.number < len(self.session.plan.stages):
            carried = {"state_dict": self.built.model.state_dict()}
            if self.session.plan.carry_optimizer:
                carried["optimizer"] = self._parts.optimizer.state_dict()
            self.session.carried = snapshot(carried)

    def _evaluates(self, original: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        self._stock_evaluate = original

        def run_evaluation(
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

        return run_evaluation

    def _validate(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace
    ) -> dict[str, float]:
        validation = Validation(self.session, self.built, self.family, self._stock_evaluate)
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
            eos_id=self.built.model.text_config.eos_id if self.family else eos_id_of(self.built.tokenizer),
            mean=tuple(self.built.preprocess_cfg["mean"]),
            std=tuple(self.built.preprocess_cfg["std"]),
        )

"""A validation during training: caption loss, OpenCLIP's own figures for CLIP and CoCa, the tasks of `--eval`, and
captions to look at."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from open_clip import CoCa
from torch import nn

from open_clip_ov2.errors import UserError
from open_clip_ov2.seam import baselines, evaluate
from open_clip_ov2.seam.eval_flags import options_of
from open_clip_ov2.seam.eval_job import EvalJob, Evaluated
from open_clip_ov2.seam.eval_tasks import headlines, run_tasks
from open_clip_ov2.seam.progress import UntilSignal
from open_clip_ov2.seam.session import Session
from open_clip_ov2.seam.stage_model import StageModel
from open_clip_ov2.seam.step import StepSettings
from open_clip_ov2.seam.subject import subject_of

logger = logging.getLogger("open_clip_ov2")


class Validation:
    """`stock` is OpenCLIP's own `evaluate`."""

    def __init__(self, session: Session, built: StageModel, family: bool, stock: Callable[..., Any]) -> None:
        self.session, self.built, self.family, self.stock = session, built, family, stock

    def run(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, settings: StepSettings,
        samples_seen: int, tasks: bool,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics by name, on every rank what that rank has of them; empty if a signal ended it. `tasks`: those of
        `--eval` too."""
        loader: Any = UntilSignal(data["val"].dataloader, self.session.signals) if "val" in data else None
        metrics: dict[str, float] = {}
        with self._eager():
            if loader is not None and (self.family or isinstance(evaluate.unwrap(model), CoCa)):
                metrics = evaluate.caption_loss(model, loader, settings)
                if self.session.agreement.now(loader.stopped):
                    logger.warning(
                        "validation left off after a signal: %s samples seen, no result", f"{samples_seen:,}"
                    )
                    return {}
            if not self.family and args.rank == 0:
                metrics |= baselines.stock_metrics(self.stock, model, loader, data, epoch, args, self.built.tokenizer)
            metrics |= self._tasks(model, args, settings) if tasks else {}
            self.session.monitor.evaluation(samples_seen, epoch, metrics)
            if self.family and args.rank == 0 and self.session.plan.options.sample_captions:
                self._show_captions(evaluate.unwrap(model), loader, samples_seen, settings)
        return metrics

    @contextlib.contextmanager
    def _eager(self) -> Iterator[None]:
        """Each length of a growing caption would be compiled anew."""
        if self.built.compile_blocks:
            torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            if self.built.compile_blocks:
                torch.compiler.set_stance("default")

    def _tasks(self, model: nn.Module, args: argparse.Namespace, settings: StepSettings) -> dict[str, float]:
        """Headlines of the tasks of `--eval`; training's random numbers stay as they are."""
        if self.session.plan.options.eval is None:
            return {}
        built = self.built
        at = Evaluated(evaluate.unwrap(model), built.val_transform, built.tokenizer, args.model)
        job = EvalJob(at, settings, options_of(self.session.plan.options.eval, "--eval"), self.session.rank)
        with torch.random.fork_rng(devices=[settings.device] if settings.device.type == "cuda" else []):
            try:
                return headlines(run_tasks(job, logger.info))
            except (UserError, ValueError) as error:  # of flags or data, and so on all ranks: training is worth more
                logger.error("--eval: %s; training goes on without these figures", error)
                return {}

    def _show_captions(self, model: Any, loader: Any, samples_seen: int, settings: StepSettings) -> None:
        batch = next(iter(loader.full()))
        count = self.session.plan.options.sample_captions
        images, keys = batch.images_BCHW[:count], batch.keys[:count]
        generated = subject_of(model, self.built.tokenizer, settings).generate(images, keys)
        cfg = self.built.preprocess_cfg
        pictures = evaluate.to_uint8(images, cfg["mean"], cfg["std"])
        self.session.monitor.captions(samples_seen, pictures, batch.captions[:count], generated)

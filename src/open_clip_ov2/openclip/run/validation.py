"""A validation during training: caption loss, OpenCLIP's own metrics of CLIP and CoCa, --eval's tasks, captions."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from open_clip import CoCa
from torch import Tensor, nn

from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import caption_loss
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.evaluation import headlines, run_tasks
from open_clip_ov2.evaluate.options import options_of
from open_clip_ov2.openclip.models.eval_models import as_eval_model, unwrap
from open_clip_ov2.openclip.run import baselines
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.openclip.run.stage_progress import UntilSignal

logger = logging.getLogger("open_clip_ov2")


class Validation:
    """`stock_evaluate` is OpenCLIP's own `evaluate`, for the metrics of CLIP and CoCa."""

    def __init__(self, session: Session, built: StageModel, stock_evaluate: Callable[..., Any]) -> None:
        self.session, self.built, self.is_ov2 = session, built, session.plan.is_ov2
        self.stock_evaluate = stock_evaluate

    def run(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, compute: Compute,
        samples_seen: int, tasks: bool,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics by name, all of them on rank 0; empty if a signal ended the validation. `tasks`: run --eval's too."""
        loader: Any = None
        if "val" in data:
            note = lambda batches: self.session.monitor.still(f"validation: {batches:,} batches so far")  # noqa: E731
            loader = UntilSignal(data["val"].dataloader, self.session.signals, note)
        metrics: dict[str, float] = {}
        with self._eager():
            if loader is not None and (self.is_ov2 or isinstance(unwrap(model), CoCa)):
                metrics = caption_loss(as_eval_model(model, self.built.tokenizer, compute), loader)
                if self.session.agreement.now(loader.stopped):
                    logger.warning("validation stopped by a signal at %s samples: no result", f"{samples_seen:,}")
                    return {}
            if not self.is_ov2 and args.rank == 0:
                metrics |= baselines.stock_metrics(
                    self.stock_evaluate, model, loader, data, epoch, args, self.built.tokenizer
                )
            metrics |= self._tasks(model, args, compute) if tasks else {}
            self.session.monitor.evaluation(samples_seen, epoch, metrics)
            if self.is_ov2 and args.rank == 0 and self.session.plan.options.sample_captions:
                self._show_captions(model, loader, samples_seen, compute)
        return metrics

    @contextlib.contextmanager
    def _eager(self) -> Iterator[None]:
        """Without torch.compile, which would compile each length of a growing caption anew."""
        if self.built.compile_blocks:
            torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            if self.built.compile_blocks:
                torch.compiler.set_stance("default")

    def _tasks(self, model: nn.Module, args: argparse.Namespace, compute: Compute) -> dict[str, float]:
        """The main figures of the tasks of --eval. Training draws the same random numbers as without them."""
        if self.session.plan.options.eval is None:
            return {}
        preprocess, tokenizer = self.built.val_transform, self.built.tokenizer
        evaluated = as_eval_model(model, tokenizer, compute, name=args.model, preprocess=preprocess)
        options = options_of(self.session.plan.options.eval, "--eval")
        with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
            try:
                job = EvalJob(evaluated, options)
                return headlines(run_tasks(job, say=logger.info))
            except (UserError, ValueError) as error:  # in flags or data, so all ranks have it; training must not end
                logger.error("--eval: %s; training continues without these figures", error)
                return {}

    def _show_captions(self, model: Any, loader: Any, samples_seen: int, compute: Compute) -> None:
        batch = next(iter(loader.full()))
        count = self.session.plan.options.sample_captions
        images, keys = batch.images_BCHW[:count], batch.keys[:count]
        generated = as_eval_model(model, self.built.tokenizer, compute).generate(images, keys)
        cfg = self.built.preprocess_cfg
        pictures = _to_uint8(images, cfg["mean"], cfg["std"])
        self.session.monitor.captions(samples_seen, pictures, batch.captions[:count], generated)


def _to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized float `(B, 3, H, W)` -> uint8, for people to look at."""
    mean_C11, std_C11 = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((images.float().cpu() * std_C11 + mean_C11).clamp(0, 1) * 255).round().to(torch.uint8)

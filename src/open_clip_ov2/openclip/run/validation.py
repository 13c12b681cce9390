"""A validation during training: caption loss, OpenCLIP's own metrics of CLIP and CoCa, --eval's tasks, captions."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from open_clip import CoCa
from torch import Tensor, nn

from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import caption_loss
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.evaluation import headlines, run_tasks
from open_clip_ov2.evaluate.options import options_of
from open_clip_ov2.openclip.models.eval_models import as_eval_model, unwrap
from open_clip_ov2.openclip.run import baselines
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.train.ema import WeightAverage
from open_clip_ov2.train.signals import StopSignals

logger = logging.getLogger("open_clip_ov2")


def until_signal(
    batches: Iterable[Batch], signals: StopSignals, note: Callable[[int], None] = lambda count: None
) -> Iterator[Batch]:
    """After a signal to this process the present batch is the last. `note` is called with their number after each.

    Schedulers signal all processes of a job. A process that is signalled alone waits for the others' validation.
    """
    for count, batch in enumerate(batches, start=1):
        yield batch
        note(count)
        if signals.name is not None:
            return


class Validation:
    """`stock_evaluate` is OpenCLIP's own `evaluate`, for the metrics of CLIP and CoCa."""

    def __init__(self, session: Session, built: StageModel, stock_evaluate: Callable[..., Any]) -> None:
        self.session, self.built, self.is_ov2 = session, built, session.plan.is_ov2
        self.stock_evaluate = stock_evaluate

    def run(
        self,
        model: nn.Module,
        data: dict[str, Any],
        epoch: int,
        args: argparse.Namespace,
        samples_seen: int,
        tasks: bool,
        average: WeightAverage | None = None,
    ) -> dict[str, float]:
        """Metrics by name, all of them on rank 0; empty if a signal ended the validation. `tasks`: run --eval's too.

        With `average` they are of the averaged weights, and live_* of the weights without averaging.
        """
        compute, averaged = self.built.compute(args), average.applied if average else contextlib.nullcontext
        # torch.compile would compile each length of a growing caption anew.
        with torch.compiler.set_stance("force_eager") if self.built.compile_blocks else contextlib.nullcontext():
            with averaged():
                metrics = self._losses(model, data, epoch, args, compute)
                if metrics is not None and tasks:
                    metrics |= self._tasks(model, args, compute)
            live = self._losses(model, data, epoch, args, compute) if average and metrics is not None else {}
            if metrics is None or live is None:
                logger.warning("validation stopped by a signal at %s samples: no result", f"{samples_seen:,}")
                return {}
            metrics |= {f"live_{name}": value for name, value in live.items() if name != "num_samples"}
            self.session.monitor.evaluation(samples_seen, epoch, metrics)
            if self.is_ov2 and args.rank == 0 and self.session.plan.options.sample_captions:
                with averaged():
                    loader = data["val"].dataloader if "val" in data else None
                    self._show_captions(model, loader, samples_seen, compute)
        return metrics

    def _losses(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace, compute: Compute
    ) -> dict[str, float] | None:
        """The caption loss, and OpenCLIP's own metrics of CLIP and CoCa; None if a signal ended the validation."""
        loader, signals = data["val"].dataloader if "val" in data else None, self.session.signals
        metrics: dict[str, float] = {}
        if loader is not None and (self.is_ov2 or isinstance(unwrap(model), CoCa)):
            evaluated = as_eval_model(model, self.built.tokenizer, compute)
            note = lambda count: self.session.monitor.still(f"validation: {count:,} batches so far")  # noqa: E731
            metrics = caption_loss(evaluated, until_signal(loader, signals, note))
            if self.session.agreement.now(signals.name is not None):
                return None
        if not self.is_ov2 and args.rank == 0:
            metrics |= baselines.stock_metrics(self.stock_evaluate, model, data, epoch, args, self.built.tokenizer)
        return metrics

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
        generated = as_eval_model(model, self.built.tokenizer, compute).generate(
            images, keys, batch.prompts[:count] or None, short_prompts=True
        )
        cfg = self.built.preprocess_cfg
        pictures = _to_uint8(images, cfg["mean"], cfg["std"])
        self.session.monitor.captions(samples_seen, pictures, batch.captions[:count], generated)


def _to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized float `(B, 3, H, W)` -> uint8, for people to look at."""
    mean_C11, std_C11 = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((images.float().cpu() * std_C11 + mean_C11).clamp(0, 1) * 255).round().to(torch.uint8)

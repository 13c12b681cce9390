"""A validation during training: caption loss, OpenCLIP's own metrics of CLIP and CoCa, --eval's tasks, captions, and
zero-shot accuracy on ImageNet under OpenCLIP's names (--imagenet-val, --imagenet-v2).

There models with a text tower classify by embeddings of OpenCLIP's 80 prompts, as OpenCLIP does, and ov2 models by the
likelihood of one caption for each class.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, CoCa
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from open_clip_ov2.core.native import NativeImages
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import caption_loss
from open_clip_ov2.evaluate.classes import PLACE, TEMPLATES, Classes
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.evaluation import headlines, run_tasks
from open_clip_ov2.evaluate.options import EvalOptions, options_of
from open_clip_ov2.evaluate.pictures import plain_pixels
from open_clip_ov2.openclip.models.eval_models import abilities_of, as_eval_model, unwrap
from open_clip_ov2.openclip.models.factory import config_named
from open_clip_ov2.openclip.run import baselines
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.train.ema import WeightAverage
from open_clip_ov2.train.signals import StopSignals

logger = logging.getLogger("open_clip_ov2")

EVAL = "eval"
SETS = {"imagenet-val": "imagenet", "imagenet-v2": "imagenetv2"}  # flag, and how its metrics begin
V2_FOLDER = "ImageNetV2-matched-frequency"  # where the package that OpenCLIP reads V2 with has put it


def until_signal(
    batches: Iterable[Batch], signals: StopSignals, note: Callable[[int], None] = lambda count: None
) -> Iterator[Batch]:
    """After a signal to this process the present batch is the last. `note` is called with their number after each.
    Schedulers signal all processes of a job. A process that is signalled alone waits for the others' validation."""
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
        """Metrics by name, all of them on rank 0, of what is in `data`: captioned samples ("val"), and evaluations on
        ImageNet. Empty if a signal ended the validation. `tasks`: run --eval's too. With `average` they are of the
        averaged weights, and live_* of the weights without averaging."""
        averaged = average.applied if average else contextlib.nullcontext
        # torch.compile would compile each length of a growing caption anew.
        with torch.compiler.set_stance("force_eager") if self.built.compile_blocks else contextlib.nullcontext():
            with averaged():
                metrics = self._losses(model, data, epoch, args)
                if metrics is not None and (asked := self._asked(data, tasks)):
                    for flag, options in asked.items():
                        metrics |= self._figures(flag, model, args, options)
                    metrics = None if self._signalled() else metrics
            live = self._losses(model, data, epoch, args) if average and metrics is not None else {}
            if metrics is None or live is None:
                logger.warning("validation stopped by a signal at %s samples: no result", f"{samples_seen:,}")
                return {}
            metrics |= {f"live_{name}": value for name, value in live.items() if name != "num_samples"}
            self.session.monitor.evaluation(samples_seen, epoch, metrics)
            if self.is_ov2 and args.rank == 0 and self.session.plan.options.sample_captions and "val" in data:
                with averaged():
                    self._show_captions(model, args, data["val"].dataloader, samples_seen)
        return metrics

    def _evaluated(self, model: nn.Module, args: argparse.Namespace) -> EvalModel:
        tokenizer, preprocess = self.built.tokenizer, self.built.val_transform
        return as_eval_model(model, tokenizer, self.built.compute(args), name=args.model, preprocess=preprocess)

    def _losses(
        self, model: nn.Module, data: dict[str, Any], epoch: int, args: argparse.Namespace
    ) -> dict[str, float] | None:
        """The caption loss, and OpenCLIP's own metrics of CLIP and CoCa; None if a signal ended the validation."""
        metrics: dict[str, float] = {}
        if "val" in data and (self.is_ov2 or isinstance(unwrap(model), CoCa)):
            metrics = caption_loss(self._evaluated(model, args), self._watched(data["val"].dataloader))
            if self._signalled():
                return None
        if not self.is_ov2 and args.rank == 0:
            metrics |= baselines.stock_metrics(self.stock_evaluate, model, data, epoch, args, self.built.tokenizer)
        return metrics

    def _asked(self, data: dict[str, Any], tasks: bool) -> dict[str, EvalOptions]:
        """The evaluations that are due, by the flag that asks for them."""
        flags = self.session.plan.options.eval
        asked = {EVAL: options_of(flags, f"--{EVAL}")} if flags is not None and tasks and "val" in data else {}
        return asked | {flag: data[flag].dataloader for flag in SETS if flag in data}

    def _figures(self, flag: str, model: nn.Module, args: argparse.Namespace, options: EvalOptions) -> dict[str, float]:
        """The main figures of an evaluation. Training draws the same random numbers as without it."""
        evaluated = self._evaluated(model, args)
        with torch.random.fork_rng(devices=[evaluated.device] if evaluated.device.type == "cuda" else []):
            try:
                results = run_tasks(EvalJob(evaluated, options, self._watched), say=logger.info)
            except (UserError, ValueError) as error:  # in flags or data, so all ranks have it; training must not end
                logger.error("--%s: %s; training continues without these figures", flag, error)
                return {}
        if flag == EVAL:
            return headlines(results)
        (found,) = results.values()
        return {f"{SETS[flag]}-zeroshot-val-{name}": found[name] for name in ("top1", "top5")}

    def _signalled(self) -> bool:
        return self.session.agreement.now(self.session.signals.name is not None)

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        note = lambda count: self.session.monitor.still(f"validation: {count:,} batches so far")  # noqa: E731
        return until_signal(batches, self.session.signals, note)

    def _show_captions(self, model: nn.Module, args: argparse.Namespace, loader: Any, samples_seen: int) -> None:
        batch = next(iter(loader.full()))
        count = self.session.plan.options.sample_captions
        images, keys = batch.images_BCHW[:count], batch.keys[:count]
        prompts = batch.prompts[:count] or None
        generated = self._evaluated(model, args).generate(images, keys, prompts, short_prompts=True)
        each = images.images() if isinstance(images, NativeImages) else images
        pictures = [plain_pixels(self.built.val_transform, image.float().cpu()) for image in each]
        self.session.monitor.captions(samples_seen, pictures, batch.captions[:count], generated)


def imagenet_evaluations(args: argparse.Namespace) -> dict[str, EvalOptions]:
    """By flag, checked. Raises UserError."""
    by_text = "contrast" in abilities_of(config_named(args.model))
    found = {}
    for flag in SETS:
        if path := getattr(args, flag.replace("-", "_")):
            folder = Path(path) / V2_FOLDER if (Path(path) / V2_FOLDER).is_dir() else Path(path)
            found[flag] = EvalOptions(
                data=str(folder),
                tasks=("zero-shot" if by_text else "likelihood",),
                classes=_classes(flag, folder),
                templates=tuple(text(PLACE) for text in OPENAI_IMAGENET_TEMPLATES) if by_text else TEMPLATES,
                batch_size=args.batch_size,
                workers=args.workers,
            )
    return found


def _classes(flag: str, folder: Path) -> Classes:
    """The folders' names are synsets (n01440764), numbers, or 1,000 others in the order of the classes, as OpenCLIP
    takes any. Raises UserError."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    synsets = ImageNetInfo().label_names()
    for known in (synsets, [str(number) for number in range(len(synsets))], names):
        if names and set(names) <= set(known) and len(known) == len(IMAGENET_CLASSNAMES):
            return Classes(tuple(IMAGENET_CLASSNAMES), {name: place for place, name in enumerate(known)})
    raise UserError(
        f"--{flag} {folder}: {len(names)} folders; expected one for each class, called by its synset (n01440764) or by "
        "its number from 0 to 999"
    )

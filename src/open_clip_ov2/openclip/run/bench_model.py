"""A model in training without data, for benchmarks: OpenCLIP's own `main` sets it up as it does for `ov2 train`.

An ov2 model trains by this package's step, any other model exactly as stock OpenCLIP trains it.
Shapes: B batch, L caption tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip_train.main as open_clip_main
import torch
from open_clip_train import train as stock_train
from torch import Tensor

from open_clip_ov2.argv import without
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.command.flags import NATIVE
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.models import baseline_configs
from open_clip_ov2.openclip.models.factory import config_named, is_ov2_config
from open_clip_ov2.openclip.models.model_facts import facts_of
from open_clip_ov2.openclip.models.tokenizer import text_cfg_for
from open_clip_ov2.openclip.run.baselines import Pair, StockData
from open_clip_ov2.openclip.run.stage_costs import image_flops
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.quiet import quiet
from open_clip_ov2.train.step import optimizer_step

NOT_HERE = ("--logs", "--val-data", "--imagenet-val", "--imagenet-v2")


def add_models(folder: Path) -> None:
    """Register the ov2 configs of a folder, and their baselines, with OpenCLIP."""
    open_clip.add_model_config(folder)
    baseline_configs.add_baselines(folder)


class BenchModel:
    """What `ov2 train ARGV` would train in its last stage. `flags_of_ov2` are added if the model is an ov2 model.
    `model`, `optimizer` and `args` (OpenCLIP's) are as training has them; `facts` are the model's sizes. Raises
    UserError for flags that `ov2 train` refuses, and for a model that is not made of plain transformers."""

    def __init__(self, argv: Sequence[str], device: str, flags_of_ov2: Sequence[str] = ()) -> None:
        parsed = partial(parse, world_size=1, gpu=device != "cpu")
        plan = parsed(argv)
        if plan.stages[-1].options.aspect == NATIVE:
            raise UserError(f"--aspect {NATIVE}: benchmarks of a step take images of one shape; leave the flag out")
        if plan.is_ov2:
            argv = [*argv, *flags_of_ov2]
            ratio = parsed(argv).stages[-1].options.keep_ratio
            plan = parsed([*argv, "--keep-ratio", str(ratio.high)] if ratio else argv)  # the worst case of a range
        self.device, self.stage = torch.device(device), plan.stages[-1]
        session: Any = SimpleNamespace(plan=plan, checkpoint=None, world_size=1)
        self._built = StageModel(session, self.stage)
        with tempfile.TemporaryDirectory() as logs, quiet(), patches.run_patches(self._replacements()):
            argv = without(self.stage.main_argv(plan.is_ov2), NOT_HERE)
            result = open_clip_main.main([*argv, "--logs", logs, "--name", "bench"])
        if result == -1:
            raise UserError(f"--model {plan.model}: OpenCLIP's main refused these flags")
        self.model: Any = self._built.model
        self.is_ov2 = plan.is_ov2
        self.facts = facts_of(plan.model, self.model)
        # Model FLOPs, forward and backward, of an image whose caption has so many target tokens on average.
        self.image_flops = image_flops(self.facts)

    def _replacements(self) -> dict[tuple[str, str], Callable[[Any], Any]]:
        """Only what changes the model and its optimizer; everything else stays OpenCLIP's own."""
        own: dict[str, Callable[[Any], Any]] = {
            "init_distributed_device": lambda _: self._one_process,
            "setup_logging": lambda _: lambda *args, **kwargs: None,
            "create_model_and_transforms": self._built.create_model,
            "get_tokenizer": lambda _: lambda *args, **kwargs: None,
            "get_data": lambda _: lambda *args, **kwargs: {"train": _as_data([])},
            "create_loss": lambda original: partial(self._create_loss, original),
            "train_one_epoch": lambda _: self._keep,
            "optim": self._built.optim,
            "create_optimizer_v2": self._built.timm_optimizer,
        }
        return {(module, name): own.get(name, lambda original: original) for module, name in patches.RUN}

    def _one_process(self, args: argparse.Namespace) -> torch.device:
        vars(args).update(device=str(self.device), rank=0, local_rank=0, world_size=1, distributed=False)
        return self.device

    def _create_loss(self, original: Callable[..., Any], args: argparse.Namespace) -> Any:
        return self._built.caption_loss(args) if self._built.is_ov2 else original(args)

    def _keep(
        self, model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, scaler: Any, scheduler: Any,
        dist_model: Any, args: argparse.Namespace, tb_writer: Any = None,
    ) -> None:  # fmt: skip
        """In place of training: keep what `main` has made. The learning rate stays as it is."""
        args.skip_scheduler, args.save_logs, args.log_every_n_steps = True, False, 10**9
        self._trained, self._loss, self.optimizer, self._scaler = model, loss, optimizer, scaler
        self._dist_model, self.args = dist_model, args

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has an embedding for."""
        named = (p for name, p in self.model.named_parameters() if name.endswith("token_embedding.weight"))
        return min(len(parameter) for parameter in named)

    def caption_ids(self, name: str) -> tuple[int, int, int, int]:
        """Vocabulary size and ids of begin, end and padding: of ov2 model `name`, or of --tokenizer's word pieces.
        Raises UserError."""
        config = config_named(name)
        if not is_ov2_config(config):
            raise UserError(f"--model {name}: expected an ov2 model; models of other kinds go into --variants")
        text = config["text_cfg"]
        if self.stage.options.tokenizer:
            text = text_cfg_for(self.stage.options.tokenizer, text["context_length"], self.stage.args.cache_dir)
        return int(text["vocab_size"]), int(text["bos_id"]), int(text["eos_id"]), int(text["pad_id"])

    def loaded(self, images: Tensor, texts: Tensor) -> Pair:
        """uint8 images `(B, 3, H, W)` as the loader gives them: unchanged for ov2, normalised float32 for others."""
        if self.is_ov2:
            return images, texts
        preprocess = self.model.visual.preprocess_cfg
        mean, std = (torch.tensor(preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
        return images.float().div_(255).sub_(mean).div_(std), texts

    def run(self, pairs: Sequence[Pair]) -> None:
        """One update for each pair from `loaded`: images `(B, 3, H, W)` and ids `(B, L)` in CPU memory. With
        --accum-freq N each pair is a micro-batch that an update sees N times."""
        repeated = [pair for pair in pairs for _ in range(self.args.accum_freq)]
        if not self.is_ov2:
            stock_train.train_one_epoch(
                self._trained, {"train": _as_data(repeated)}, self._loss, 0, self.optimizer, self._scaler, None,
                self._dist_model, self.args, tb_writer=None,
            )  # fmt: skip
            return
        settings = self._built.step_settings(self.args)
        for images_BCHW, texts_BL in pairs:
            batch = Batch(images_BCHW, texts_BL, keys=[], captions=[], groups=[], skipped={})
            window = [batch] * self.args.accum_freq
            optimizer_step(self._trained, window, self._loss, self.optimizer, self._scaler, settings)


def _as_data(pairs: Sequence[Pair]) -> StockData:
    return StockData(pairs, len(pairs), sum(len(images) for images, _ in pairs))

"""One model in training, for benchmarks: ours with our step, any other exactly as stock OpenCLIP trains it.

Shapes: B batch, L caption tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip_train import train as stock_train
from open_clip_train.params import parse_args
from torch import Tensor, nn

from open_clip_ov2.core import CaptionLoss, CaptionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models import baseline_configs
from open_clip_ov2.openclip.models.factory import is_ov2_config, known_models
from open_clip_ov2.openclip.models.model_facts import facts_of
from open_clip_ov2.openclip.models.tokenizer import text_cfg_for, text_options
from open_clip_ov2.openclip.run import baselines, optimizers
from open_clip_ov2.openclip.run.stage_costs import image_flops
from open_clip_ov2.train.step import StepSettings, optimizer_step

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ContenderOptions:
    model: str
    resolution: int
    precision: str
    batch_size: int
    device: str
    compile: bool = False
    memory_budget: float | None = None  # with `compile`, of an ov2 model: see CaptionModel.compile_blocks
    keep_ratio: float | None = None
    tokenizer: str | None = None  # word pieces in the place of the model's own vocabulary
    context_length: int | None = None
    patch_dropout: float | None = None
    fusion: str | None = None  # of an ov2 model
    grad_checkpointing: bool = False


def add_models(folder: Path) -> None:
    """ov2 configs of a folder, and their counterparts, into OpenCLIP's registry."""
    open_clip.add_model_config(folder)
    baseline_configs.add_baselines(folder)


class Contender:
    """`run` trains on pairs of images and ids. Raises UserError for a model that is not there, or not of our kind."""

    def __init__(self, options: ContenderOptions) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.args = _stock_args(options)
        self.model = self._built()
        self.family = isinstance(self.model, CaptionModel)
        self.facts = facts_of(options.model, self.model)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(device=self.device.type) if options.precision == "amp" else None
        self.model.train()
        self.loss: Any = CaptionLoss() if self.family else open_clip.create_loss(self.args)
        self.trained: Any = self._compiled()

    @property
    def _preprocess(self) -> dict[str, Any]:
        return self.model.visual.preprocess_cfg

    @property
    def context_length(self) -> int:
        return self.facts.context_length

    @property
    def vocabulary(self) -> int:
        """Ids that it has an embedding for."""
        named = (p for name, p in self.model.named_parameters() if name.endswith("token_embedding.weight"))
        return min(len(parameter) for parameter in named)

    def image_flops(self, mean_targets: float) -> float:
        """Model FLOPs, forward and backward, of an image whose caption has so many real targets on average."""
        return image_flops(self.facts)(mean_targets)

    def _built(self) -> Any:
        name, options = self.options.model, self.options
        if ":" not in name and name not in known_models():
            raise UserError(f"{name}: no such model (open_clip.list_models() lists them)")
        given = {"keep_ratio": options.keep_ratio, "fusion": options.fusion}
        extra: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if options.tokenizer:
            config = open_clip.get_model_config(name) or {}
            context_length = options.context_length or config["text_cfg"].get("context_length", 77)
            extra |= text_options(name, config, text_cfg_for(options.tokenizer, context_length))
        try:
            model, _, _ = open_clip.create_model_and_transforms(
                name, None, precision=options.precision, device=self.device, force_image_size=options.resolution,
                output_dict=True, load_weights=False, force_context_length=options.context_length,
                force_patch_dropout=options.patch_dropout, **extra,
            )  # fmt: skip
        except (ValueError, AssertionError, OSError) as error:
            raise UserError(f"{name} at {options.resolution} px: {error}") from error
        baselines.init_coca_head(model)
        if options.grad_checkpointing:
            model.set_grad_checkpointing()
        return model

    def _compiled(self) -> nn.Module:
        if not self.options.compile:
            return self.model
        if self.family:
            self.model.compile_blocks(memory_budget=self.options.memory_budget)
            self.loss.compile_softmax()
            return self.model
        return torch.compile(self.model)  # type: ignore[return-value]

    def _optimizer(self) -> torch.optim.Optimizer:
        """As OpenCLIP's `main` groups parameters; ov2's is the one that `ov2 train` puts in its place."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        plain = [p for name, p in named if _undecayed(name, p)]
        decayed = [p for name, p in named if not _undecayed(name, p)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": self.args.wd}]
        optim: Any = torch.optim
        if self.family:
            optim = optimizers.optim_for(lambda: (dict(self.model.named_parameters()), self.model.no_weight_decay()))
        return optim.AdamW(groups, lr=self.args.lr, betas=(self.args.beta1, self.args.beta2), eps=self.args.eps)

    def loaded(self, images: Tensor, texts: Tensor) -> Pair:
        """Uint8 images as its loader hands them over: ours as they are, stock OpenCLIP's normalised float32."""
        if self.family:
            return images, texts
        mean, std = (torch.tensor(self._preprocess[key]).view(3, 1, 1) for key in ("mean", "std"))
        return images.float().div_(255).sub_(mean).div_(std), texts

    def run(self, pairs: Sequence[Pair]) -> None:
        """One update for each pair `loaded`, of images `(B, 3, H, W)` and ids `(B, L)` in the host's memory."""
        if self.family:
            self._run_ours(pairs)
        else:
            self._run_stock(pairs)

    def _run_ours(self, pairs: Sequence[Pair]) -> None:
        compute = Compute(
            device=self.device,
            precision=self.options.precision,
            world_size=1,
            eos_id=self.model.text_config.eos_id,
            mean=tuple(self._preprocess["mean"]),
            std=tuple(self._preprocess["std"]),
        )
        settings = StepSettings(compute, 1, self.args.grad_clip_norm, self.args.coca_caption_loss_weight)
        for images_BCHW, texts_BL in pairs:
            batch = Batch(images_BCHW, texts_BL, keys=[], captions=[], groups=[], skipped={})
            optimizer_step(self.trained, [batch], self.loss, self.optimizer, self.scaler, settings)

    def _run_stock(self, pairs: Sequence[Pair]) -> None:
        feed = _Feed(pairs)
        data = {"train": SimpleNamespace(dataloader=feed, set_epoch=lambda _: None)}
        stock_train.train_one_epoch(
            self.trained, data, self.loss, 0, self.optimizer, self.scaler, None, None, self.args, tb_writer=None
        )


class _Feed:
    """What OpenCLIP's loop wants of a loader."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self.num_batches, self.num_samples = len(pairs), sum(len(images) for images, _ in pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)


def _undecayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


def _stock_args(options: ContenderOptions) -> Any:
    """OpenCLIP's own defaults, and what its `main` adds for one process. The learning rate stays as it is."""
    args = parse_args(
        [
            "--model", options.model, "--precision", options.precision, "--batch-size", str(options.batch_size),
            "--device", options.device, "--skip-scheduler", "--log-every-n-steps", str(10**9),
        ]
    )  # fmt: skip
    args.distributed, args.rank, args.local_rank, args.world_size = False, 0, 0, 1
    args.distill, args.wandb, args.save_logs = False, False, False
    return args


def enter_main(device: torch.device) -> None:
    """What OpenCLIP's `main` sets for the whole process, and less to read."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False
    logging.disable(logging.WARNING)


def caption_ids(name: str, tokenizer: str | None = None) -> tuple[int, int, int, int]:
    """Size of an ov2 model's vocabulary, and its ids of begin, end and padding; or those of a folder of word pieces.
    Raises UserError."""
    config = open_clip.get_model_config(name) or {}
    if not is_ov2_config(config):
        raise UserError(f"--model {name}: no ov2 model; contenders of other kinds go into --arms")
    text = text_cfg_for(tokenizer, config["text_cfg"]["context_length"]) if tokenizer else config["text_cfg"]
    return int(text["vocab_size"]), int(text["bos_id"]), int(text["eos_id"]), int(text["pad_id"])

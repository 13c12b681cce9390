"""The model of one stage, its tokenizer and its optimizer, as OpenCLIP's `main` asks for them."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from open_clip import ClipLoss
from open_clip import factory as open_clip_factory
from torch import nn

from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.attention import use_flash_attention
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.crop import TokenBudget
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.openclip.command.flags import FAMILY, NATIVE, TrainOptions
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.factory import config_named
from open_clip_ov2.openclip.models.own_config import MAX_TOKENS, OwnConfig, brings_weights, named_config
from open_clip_ov2.openclip.models.preprocess import (
    eval_transform,
    native_budget,
    ov2_preprocess_options,
    train_crop,
)
from open_clip_ov2.openclip.models.related import ContrastiveCaptionModel
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer, caching, eos_id_of, text_cfg_for, text_options
from open_clip_ov2.openclip.models.weights import check_fit
from open_clip_ov2.openclip.run import baselines, optimizers
from open_clip_ov2.openclip.run.finetune import add_lora, freeze, use_float8
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.train.checkpoint import RESUME_KEY, average_of, live_weights
from open_clip_ov2.train.parallel import Sharded, Whole, blocks_of
from open_clip_ov2.train.step import StepSettings

logger = logging.getLogger("open_clip_ov2")


def model_options(options: TrainOptions, args: argparse.Namespace) -> dict[str, Any]:
    """Options of `create_model` beyond the model's config. Raises UserError for a missing vocabulary."""
    extra: dict[str, Any] = options.model_options()
    if options.tokenizer:
        config = config_named(args.model)
        length = args.force_context_length or config["text_cfg"].get("context_length", 77)
        extra |= text_options(args.model, config, text_cfg_for(options.tokenizer, length, args.cache_dir))
    return extra


def stated_options(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sizes and ratios of NAME, given explicitly: a checkpoint does not bring its own to a run, whose flags say all.
    `kwargs` of `create_model` are completed; the options beyond them are returned."""
    config = config_named(name)
    for key, section, size in (("image_size", "vision_cfg", 224), ("context_length", "text_cfg", 77)):
        if kwargs.get(f"force_{key}") is None:
            kwargs[f"force_{key}"] = config[section].get(key, size)
    return {"keep_ratio": config.get("keep_ratio", 0.35), "eval_keep_ratio": config.get("eval_keep_ratio")}


def _created(original: Callable[..., Any], flag: str, name: str, pretrained: str | None, **options: Any) -> Any:
    try:
        return original(name, pretrained, **options)
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UserError(f"{flag} {name}: {first_line(error)}") from error


def _lock(model: Any, args: argparse.Namespace) -> None:
    """As OpenCLIP's `main` does."""
    if args.lock_image:
        model.lock_image_tower(
            unlocked_groups=args.lock_image_unlocked_groups, freeze_bn_stats=args.lock_image_freeze_bn_stats
        )
    if args.lock_text:
        model.lock_text_tower(
            unlocked_layers=args.lock_text_unlocked_layers, freeze_layer_norm=args.lock_text_freeze_layer_norm
        )


class StageModel:
    """`model`, `parallel`, `extra`, `tokenizer` and `preprocess_cfg` are set once `main` has asked for them. Weights
    come from the session's checkpoint, or --pretrained, or are new."""

    def __init__(self, session: Session, stage: StagePlan) -> None:
        self.session = session
        self.stage, self.options, self.args = stage, stage.options, stage.args
        self.is_ov2 = session.plan.is_ov2
        self.compiles, self.precision = stage.args.torchcompile, stage.args.precision
        self.compile_blocks = self.is_ov2 and self.compiles
        self.model: Any = None
        self.tokenizer: Any = None
        self.val_transform: Any = None
        self.preprocess_cfg: dict[str, Any] = {}
        self.budget: TokenBudget | None = None  # of --aspect native
        self.extra: dict[str, Any] = {}  # see `model_options`
        self.averages: dict[str, Any] | None = None  # what --ema-decay begins with; None: the weights themselves

    def create_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In the place of OpenCLIP's `create_model_and_transforms`."""

        def create_model(name: str, pretrained: str | None = None, **kwargs: Any) -> Any:
            if self.model is not None:
                return _created(original, "--distill-model", name, pretrained, **kwargs)
            extra, checkpoint = model_options(self.options, self.args), self.session.checkpoint
            own = named_config(f"local-dir:{self.session.plan.folder}") if checkpoint is not None else None
            if own is not None and "decoder_cfg" in own.model_cfg:
                # A run goes on with the decoder it began with, though the model of that name may have another by now.
                extra["decoder_cfg"] = own.model_cfg["decoder_cfg"]
            self.extra = extra
            if checkpoint is not None:
                pretrained, kwargs["pretrained_image"], kwargs["load_weights"] = None, False, False
            elif self.is_ov2 and (pretrained or brings_weights(name)):
                extra = stated_options(name, kwargs) | extra
            kwargs |= self._pixel_options(kwargs)
            model, train_tf, _ = _created(original, "--model", name, pretrained, **kwargs, **extra)
            if checkpoint is None and not pretrained and not brings_weights(name):
                baselines.init_coca_head(model)
            if self.options.lora_rank:
                add_lora(model, self.options.lora_rank, self.options.lora_alpha)
            if checkpoint is not None and not self.session.state_within:
                self._load_previous_stage(model, checkpoint)
            _lock(model, self.args)
            freeze(model, self.options.freeze)
            self._use_kernels(model, torch.device(kwargs["device"]))
            self.model, self.preprocess_cfg = model, dict(model.visual.preprocess_cfg)
            self.parallel = Whole(model)
            self.budget = native_budget(model, self.options.max_tokens) if self.options.aspect == NATIVE else None
            self.val_transform = eval_transform(self.preprocess_cfg, self.budget)
            if self.is_ov2:  # a crop to uint8 for our step; OpenCLIP's, of CLIP and CoCa, wants normalized floats
                fast = self.options.decode != "exact"
                train_tf = train_crop(self.preprocess_cfg, kwargs["aug_cfg"], fast, self.budget) or train_tf
            return model, train_tf, self.val_transform

        return create_model

    def _use_kernels(self, model: Any, device: torch.device) -> None:
        """Raises UserError for kernels that are not here."""
        options = self.options
        if options.attention_kernel:
            try:
                use_flash_attention(options.attention_kernel)
            except ValueError as error:
                raise UserError(f"--attention-kernel: {error}") from None
        if options.fp8:
            use_float8(model, options.fp8, device)
        if self.compile_blocks:
            model.compile_blocks(
                memory_budget=options.activation_memory_budget,
                elementwise=options.recompute_elementwise,
                encoder=options.compile_encoder,
            )
        elif options.recompute_elementwise:
            model.recompute_elementwise()

    def _pixel_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `create_model_and_transforms` that follow from those that `main` gives and our flags."""
        own = ov2_preprocess_options(given) if self.options.augmentation == FAMILY and not self.is_ov2 else {}
        if isinstance(size := given.get("force_image_size"), list):
            own["force_image_size"] = tuple(size)  # OpenCLIP's call of timm's augmentation fails with a list
        return {**own, "aug_cfg": self.options.aug_cfg(given.get("aug_cfg"))}

    def _load_previous_stage(self, model: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Load the weights of the previous stage, with position tables fitted to this grid; their average too."""
        weights = live_weights(checkpoint)
        self.averages = {**weights, **average_of(checkpoint)}
        for state in (weights, self.averages):
            open_clip_factory.resize_pos_embed(state, model)
            if hasattr(model, "positional_embedding") or hasattr(getattr(model, "text", None), "positional_embedding"):
                open_clip_factory.resize_text_pos_embed(state, model)
        self._check("the previous stage", weights, model)
        model.load_state_dict(weights)

    def load_checkpoint(self, *_: Any, **__: Any) -> dict[str, Any]:
        """In the place of OpenCLIP's `pt_load`: the checkpoint to resume from, with the names of a model in DDP."""
        assert self.session.checkpoint is not None
        content = {key: value for key, value in self.session.checkpoint.items() if key != RESUME_KEY}
        weights = self.parallel.place_weights(live_weights(self.session.checkpoint))
        self._check("the checkpoint to resume from", weights, self.model)
        content["state_dict"] = {f"{self.parallel.prefix}{name}": value for name, value in weights.items()}
        content["optimizer"] = self.parallel.place_optimizer(content["optimizer"])
        return content

    def _check(self, what: str, state: Mapping[str, Any], model: nn.Module) -> None:
        """Raises UserError if --override has changed the model itself, or --resume FILE has another."""
        try:
            check_fit(what, state, model.state_dict())
        except ValueError as error:
            flag = "--override" if self.session.plan.options.override else "--resume"
            problem = f"{flag}: another model than before: {error}; start another run for it (--name)"
            raise UserError(problem) from error

    def distribute(self, original: type) -> Callable[..., nn.Module]:
        """In the place of DistributedDataParallel."""

        def distributed(module: nn.Module, **kwargs: Any) -> nn.Module:
            if module is not self.model:
                return module  # the teacher of --distill-model, which has no gradients
            layout, reduction = self.session.layout, self.options.gradient_reduction
            if reduction == "bf16":
                logger.info("gradients are summed between processes in bfloat16")
            if layout is None:
                self.parallel = Whole(self.model, prefix="module.")
                return optimizers.ddp_on_any_device(original, reduction)(module, **kwargs)
            if self.compiles and not self.compile_blocks:
                for block in blocks_of(module):
                    block.compile()
            self.parallel = Sharded(module, layout, self.precision, torch.bfloat16 if reduction == "bf16" else None)
            return module

        return distributed

    def get_tokenizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_tokenizer(name: str, **kwargs: Any) -> Any:
            if (words := self.options.tokenizer) is not None:
                self.tokenizer = WordPieceTokenizer(words, self.model.context_length, kwargs.get("cache_dir"))
            else:
                self.tokenizer = caching(original(name, **kwargs))
            return self.tokenizer

        return get_tokenizer

    def own_config(self) -> OwnConfig:
        """The configuration of the model in training, with every flag that changed it folded in."""
        args, cfg = self.args, config_named(self.args.model)
        cfg.update({key: str(value) if key == "keep_ratio" else value for key, value in self.extra.items()})
        if self.stage.image_size is not None:
            cfg["vision_cfg"]["image_size"] = self.stage.image_size
        if args.force_context_length is not None:
            cfg["text_cfg"]["context_length"] = args.force_context_length
        if not self.is_ov2:  # without these the weights do not fit, or compute something else
            cfg |= {"quick_gelu": True} if args.force_quick_gelu else {}
            cfg |= {"custom_text": True} if args.force_custom_text else {}
            cfg |= {"init_logit_bias": -10} if args.siglip else {}  # whatever number: the weights have the trained one
        preprocess = {**self.preprocess_cfg, **({} if self.budget is None else {MAX_TOKENS: self.budget.most})}
        vocabulary = self.tokenizer.vocabulary if isinstance(self.tokenizer, WordPieceTokenizer) else None
        plain = json.loads(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
        return OwnConfig(**plain, vocabulary=vocabulary)

    def compute(self, args: argparse.Namespace) -> Compute:
        return Compute(
            device=torch.device(args.device),
            precision=args.precision,
            world_size=args.world_size,
            eos_id=self.model.text_config.eos_id if self.is_ov2 else eos_id_of(self.tokenizer),
            mean=tuple(self.preprocess_cfg["mean"]),
            std=tuple(self.preprocess_cfg["std"]),
        )

    def step_settings(self, args: argparse.Namespace) -> StepSettings:
        weights = (args.coca_caption_loss_weight, args.coca_contrastive_loss_weight)
        tokens = self.options.tokens_per_step
        return StepSettings(self.compute(args), args.accum_freq, args.grad_clip_norm, *weights, tokens_per_step=tokens)

    def caption_loss(self, args: argparse.Namespace) -> CaptionLoss:
        """Of an ov2 model, with OpenCLIP's own contrastive loss for one that has a text encoder. Features of all
        processes are gathered with their gradient, so that it is that of the global batch."""
        contrast = None
        if isinstance(self.model, ContrastiveCaptionModel):
            contrast = ClipLoss(local_loss=True, gather_with_grad=True, rank=args.rank, world_size=args.world_size)
        loss = CaptionLoss(label_smoothing=self.options.label_smoothing, z_loss=self.options.z_loss, contrast=contrast)
        if self.compile_blocks:
            loss.compile_softmax()
        return loss

    def optim(self, original: Any) -> Any:
        """In the place of `torch.optim`, of which `main` takes AdamW."""
        adamw = optimizers.adamw_for(self._grouping, **({"fused": True} if self.is_ov2 else {}))
        return SimpleNamespace(AdamW=optimizers.with_hyperparameters(adamw))

    def timm_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In the place of timm's `create_optimizer_v2`."""
        return optimizers.with_hyperparameters(optimizers.timm_optimizer(original, self._grouping))

    def _grouping(self) -> optimizers.Grouping:
        return optimizers.Grouping(self.model, self.options.wd_exclude, self.options.lr_layer_decay)

"""The model of one stage, its tokenizer and its optimizer, as OpenCLIP's `main` asks for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from open_clip import factory as open_clip_factory
from torch import nn

from open_clip_ov2.data.crop import RandomCrop
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flags import FAMILY, TrainOptions
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.preprocess import color_jitter_cfg, ov2_preprocess_options, train_crop
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer, caching, text_cfg_for, text_options
from open_clip_ov2.openclip.models.weights import check_fit
from open_clip_ov2.openclip.run import baselines
from open_clip_ov2.openclip.run import optimizers as shims
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.train.checkpoint import RESUME_KEY

CHOSEN = ("image_mean", "image_std")  # what somebody chose stays, with ov2 models too


def model_options(options: TrainOptions, name: str, context_length: int | None) -> dict[str, Any]:
    """What `create_model` gets on top of the model's config. Raises UserError for a missing vocabulary."""
    extra: dict[str, Any] = options.model_options()
    if options.tokenizer:
        config = open_clip_factory.get_model_config(name) or {}
        words = text_cfg_for(options.tokenizer, context_length or config["text_cfg"].get("context_length", 77))
        extra |= text_options(name, config, words)
    return extra


def _check_model(what: str, state: dict[str, Any], model: nn.Module) -> None:
    """Raises UserError where --override has changed the model itself."""
    try:
        check_fit(what, state, model.state_dict())
    except ValueError as error:
        raise UserError(
            f"--override: another model than before: {error}; --name another run, and start it anew"
        ) from error


class StageModel:
    """`model`, `tokenizer` and `preprocess_cfg` are there once `main` has asked.

    Weights come from `found` (a checkpoint within the stage), or the stage before, or --pretrained, or are new.
    """

    def __init__(self, session: Session, stage: StagePlan, found: dict[str, Any] | None) -> None:
        self.session = session
        self.options = stage.options
        self.family = session.plan.family
        self.compile_blocks = self.family and stage.args.torchcompile
        self.model: Any = None
        self.tokenizer: Any = None
        self.val_transform: Any = None
        self.preprocess_cfg: dict[str, Any] = {}
        self._found = found

    def creates_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create(name: str, pretrained: str | None = None, **kwargs: Any) -> Any:
            extra = model_options(self.options, name, kwargs.get("force_context_length"))
            if self.session.carried is not None or self._found:
                pretrained, kwargs["pretrained_image"] = None, False
            if self.options.augmentation == FAMILY and not self.family:
                kwargs |= {**ov2_preprocess_options(), **{key: kwargs[key] for key in CHOSEN if kwargs.get(key)}}
            if self.options.color_jitter:
                kwargs["aug_cfg"] = {**color_jitter_cfg(), **(kwargs.get("aug_cfg") or {})}
            try:
                model, train_tf, val_tf = original(name, pretrained, **kwargs, **extra)
            except (ValueError, RuntimeError, AssertionError, OSError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"--model {name}: {reason}") from error
            if self.session.carried is not None:
                self._take_over(model)
            elif not pretrained and not self._found:
                baselines.init_coca_head(model)
            if self.compile_blocks:
                model.compile_blocks(memory_budget=self.options.activation_memory_budget)
            self.model, self.preprocess_cfg = model, dict(model.visual.preprocess_cfg)
            self.val_transform = val_tf
            return model, self._train_crop(kwargs.get("aug_cfg")) or train_tf, val_tf

        return create

    def _train_crop(self, aug_cfg: dict[str, Any] | None) -> RandomCrop | None:
        """Uint8 crops, for our step; the stock one of CLIP and CoCa wants them normalised. Raises UserError."""
        if not self.family:
            return None
        crop = train_crop(self.preprocess_cfg, aug_cfg, fast=self.options.decode != "exact")
        if crop is None and self.options.decode == "fast":
            raise UserError(
                "--decode fast: the crop of this --aug-cfg or --model is not the family's own, and takes whole "
                "pictures; leave --decode out"
            )
        return crop

    def _take_over(self, model: nn.Module) -> None:
        """The weights of the stage before; its position table fitted to this stage's grid."""
        assert self.session.carried is not None
        weights = dict(self.session.carried["state_dict"])
        open_clip_factory.resize_pos_embed(weights, model)
        if hasattr(model, "positional_embedding") or hasattr(getattr(model, "text", None), "positional_embedding"):
            open_clip_factory.resize_text_pos_embed(weights, model)
        _check_model("the stage before", weights, model)
        model.load_state_dict(weights)

    def load(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The checkpoint to go on from, with names as `main`'s model has them, and the epoch to start with."""
        assert self._found is not None
        found = {key: value for key, value in self._found.items() if key != RESUME_KEY}
        self._found = None  # as large as the model
        _check_model("the checkpoint to go on from", found["state_dict"], self.model)
        if self.session.world_size > 1:
            found["state_dict"] = {f"module.{name}": value for name, value in found["state_dict"].items()}
        return found

    def model_options(self, args: argparse.Namespace) -> dict[str, Any]:
        return model_options(self.options, args.model, args.force_context_length)

    def gets_tokenizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_tokenizer(name: str, **kwargs: Any) -> Any:
            if self.options.tokenizer:
                self.tokenizer = WordPieceTokenizer(
                    self.options.tokenizer, self.model.context_length, kwargs.get("cache_dir")
                )
            else:
                self.tokenizer = caching(original(name, **kwargs))
            return self.tokenizer

        return get_tokenizer

    def optim(self, original: Any) -> Any:
        return shims.optim_for(self._model_parameters) if self.family else original

    def _model_parameters(self) -> tuple[dict[str, nn.Parameter], set[str]]:
        return dict(self.model.named_parameters()), self.model.no_weight_decay()

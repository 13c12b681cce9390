"""A checkpoint opened by the name of its model: `create_model(NAME, pretrained=FILE)`, `ov2 train --pretrained FILE`.

`create_model` makes the model that the file is, with the caller's own options, and one warning names what differs from
NAME's configuration and from the file's. A run's folder is its newest checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip import factory as open_clip_factory

from open_clip_ov2.core import CaptionModel, DecoderConfig
from open_clip_ov2.core.vision import ImageModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models import own_config
from open_clip_ov2.openclip.models.factory import DECODER_KEY, complete_vision_cfg, is_ov2_config, is_vision_only
from open_clip_ov2.openclip.models.own_config import OwnConfig
from open_clip_ov2.openclip.models.shipped import WEIGHTS, shipped_folder
from open_clip_ov2.openclip.models.tokenizer import find_vocab
from open_clip_ov2.openclip.models.weights import load_strictly
from open_clip_ov2.openclip.models.weights import load_weights as read_weights

logger = logging.getLogger(__name__)

# Flags of `ov2 train` for what a checkpoint was trained with, where the shapes of its weights do not show a difference.
STATED = {
    "--fusion": "fusion", "--tokenizer": "tokenizer", "--image-mean": "mean", "--image-std": "std",
    "--image-interpolation": "interpolation", "--image-resize-mode": "resize mode",
}  # fmt: skip
OF_IMAGES = ("image size", "mean", "std", "interpolation", "resize mode")


def create_with_own_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint brings its own config, a run's folder its newest weights; pretrained_image_path must fit an ov2
    model, and OpenCLIP loads it with strict=False and only logs its errors."""

    def create_model(
        model_name: str, pretrained: str | None = None, load_weights: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        encoder, checkpoint = kwargs.get("pretrained_image_path"), _checkpoint(model_name, pretrained, load_weights)
        named = own_config.named_config(model_name) if encoder or checkpoint else None
        if named is None or not (named.is_ours or (checkpoint and own_config.is_of_ov2_train(checkpoint))):
            return original(model_name, pretrained, load_weights, *args, **kwargs)
        if named.is_ours:
            kwargs["pretrained_image_path"] = None
        own = own_config.config_of(checkpoint) if checkpoint else None
        if own is None and checkpoint and model_name.startswith(own_config.LOCAL):
            own = named
        if checkpoint and own and own.has_decoder == named.has_decoder:
            check_same_model(model_name, named, checkpoint, own)
            with own_config.as_folder(checkpoint, own) as folder:
                model = original(folder, None, load_weights, *args, **kwargs)
            _warn(checkpoint, _taken(checkpoint, own, model, model_name, named) + _changed(own, model))
        else:
            model = original(model_name, pretrained, load_weights, *args, **kwargs)
            _check_encoder(checkpoint, model, model_name, named)
        if encoder and named.is_ours:
            read_weights(model, str(encoder), encoder_only=True)
            _check_encoder(Path(encoder), model, model_name, named)
        return model

    return create_model


def load_and_tell(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under its public name; what the model has otherwise than the checkpoint is logged."""
    load = load_strictly(original)

    def load_checkpoint(model: Any, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        report, file = load(model, checkpoint_path, *args, **kwargs), Path(checkpoint_path)
        made_here = isinstance(model, ImageModel) and hasattr(model.visual, "preprocess_cfg")
        if made_here and (own := own_config.config_of(file)):
            of_all = own.has_decoder and isinstance(model, CaptionModel)
            _warn(file, _changed(own, model, () if of_all else OF_IMAGES))
        return report

    return load_checkpoint


def _checkpoint(name: str, pretrained: str | None, load_weights: bool) -> Path | None:
    """The file that a call is about: `pretrained`, or the newest of the run that the name is."""
    if pretrained:
        folder = shipped_folder(f"{name}:{pretrained}")
        file = Path(pretrained) if folder is None else folder / WEIGHTS
        return file if file.is_file() else None
    schema, where = open_clip_factory.parse_model_name(name)
    if schema != "local-dir" or not load_weights or own_config.has_weights(Path(where)):
        return None
    return own_config.newest_of_run(Path(where))


def check_same_model(name: str, named: OwnConfig, checkpoint: Path, own: OwnConfig) -> None:
    """Raises UserError if a checkpoint has other sizes than the model by whose name it is opened: not all of them
    change the shapes of weights, such as the number of heads."""
    ours, theirs = _sizes(named.model_cfg), _sizes(own.model_cfg)
    if not own.has_decoder:  # its encoder may go into a model with a decoder
        ours = {key: value for key, value in ours.items() if key in theirs}
    differing = [f"{key} {theirs.get(key)}, not {ours[key]}" for key in ours if ours[key] != theirs.get(key)]
    if differing:
        raise UserError(f"{checkpoint}: not the model {name}: {'; '.join(differing)}; open it by its own folder")


def _sizes(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    given = model_cfg["vision_cfg"]
    if is_ov2_config(model_cfg) or is_vision_only(model_cfg):
        given = complete_vision_cfg(given)
    vision = {"head_width": 64, "mlp_ratio": 4.0, **given}
    vision["mlp_width"] = int(vision.get("width", 0) * vision["mlp_ratio"])
    sizes = {f"encoder {key}": vision.get(key) for key in ("width", "layers", "head_width", "mlp_width", "patch_size")}
    if decoder := model_cfg.get(DECODER_KEY):
        sizes |= {f"decoder {key}": value for key, value in asdict(DecoderConfig(**decoder)).items() if key != "fusion"}
    return sizes


def _check_encoder(checkpoint: Path | None, model: Any, name: str, named: OwnConfig) -> None:
    """Warn if an encoder was trained on other images than the model gets. Raises UserError for other sizes."""
    own = own_config.config_of(checkpoint) if checkpoint else None
    if checkpoint and own:
        check_same_model(name, named, checkpoint, own)
        _warn(checkpoint, _changed(own, model, OF_IMAGES))


def _taken(checkpoint: Path, own: OwnConfig, model: Any, name: str, named: OwnConfig) -> list[str]:
    """What the model has of the checkpoint that the name has otherwise."""
    made, implied, taken = own_config.settings_of(model), named.settings(), []
    for key, value in own.settings().items():
        if made.get(key, value) == value != implied.get(key, value):
            taken.append(f"{key} {_shown(value)} ({name}: {_shown(implied[key])})")
            if key == "tokenizer":
                taken[-1] += f"; get it with open_clip_ov2.open_model({str(checkpoint)!r}).tokenizer"
    return [f"its own configuration is used: {', '.join(taken)}"] if taken else []


def _changed(own: OwnConfig, model: Any, keys: Collection[str] = ()) -> list[str]:
    """What the model has otherwise than the checkpoint, of all settings or of some."""
    made, trained = own_config.settings_of(model), own.settings()
    return [
        f"{key} {_shown(made[key])} instead of the checkpoint's {_shown(trained[key])}"
        for key in keys or made
        if key in trained and made[key] != trained[key]
    ]


def _warn(checkpoint: Path, differences: list[str]) -> None:
    if differences:
        logger.warning("%s: %s", checkpoint, "; ".join(differences))


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unstated(
    name: str, pretrained: str | None, stated: Collection[str], tokenizer: str | None, cache_dir: str | None = None
) -> list[str]:
    """Flags of `ov2 train` that a checkpoint was trained with, and that `stated` lacks and NAME does not imply: those
    whose difference the weights' shapes do not show. Raises UserError, also for a `tokenizer` with other words, and
    for a run's folder without a checkpoint. Without `pretrained`, NAME brings all of it."""
    checkpoint = _checkpoint(name, pretrained, load_weights=True)
    named, own = (own_config.named_config(name), own_config.config_of(checkpoint)) if checkpoint else (None, None)
    if checkpoint is None or named is None or own is None or own.has_decoder != named.has_decoder:
        return []
    if not named.is_ours and not own_config.is_of_ov2_train(checkpoint):
        return []
    check_same_model(name, named, checkpoint, own)
    words = str(own.folder) if own.folder else f"FOLDER (written by `ov2 export {checkpoint} --to ov2 --out FOLDER`)"
    if tokenizer and own.vocabulary not in (None, find_vocab(tokenizer, cache_dir).read_text(encoding="utf-8")):
        raise UserError(
            f"--tokenizer {tokenizer}: not the words that {checkpoint} was trained with; --tokenizer {words}"
        )
    if not pretrained:
        return []
    trained, implied = own.settings(), named.settings()
    return [
        f"{flag} {words if key == 'tokenizer' else _shown(trained[key])}"
        for flag, key in STATED.items()
        if flag not in stated and trained.get(key) != implied.get(key)
    ]

"""Image preprocessing of ov2 models: ImageNet mean/std, bilinear; in training an inception crop.

Source: docs/reference.md, "Recipe": area 40% to 100%, bilinear with antialias, then color jitter and grayscale at
strength 0.4 with `--color-jitter`; evaluation resizes the short side to the resolution and crops the center.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import AugmentationCfg, PreprocessCfg
from torch import nn
from torchvision import transforms as T

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.data.crop import Box, RandomCrop

logger = logging.getLogger(__name__)

CROP_AREA = (0.4, 1.0)  # docs/reference.md: inception crop, area 40% to 100%
# SimCLR's jitter (arXiv 2002.05709, appendix A) at strength 0.4, each with its probability.
JITTER = (0.32, 0.32, 0.32, 0.08)
JITTER_PROBABILITY, GREY_PROBABILITY = 0.8, 0.2


class Ov2Bilinear(str):
    """The interpolation of an ov2 model, "bilinear"; its type tells OpenCLIP's transforms whose crop to use.

    It travels in `preprocess_cfg`, so the right crop comes out however the model was made.
    """


def ov2_preprocess_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg` with OpenCLIP's stock values replaced by ours; values that somebody chose stay."""
    ours = dict(cfg)
    if (tuple(cfg["mean"]), tuple(cfg["std"])) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD):
        ours |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    interpolation = cfg["interpolation"]
    ours["interpolation"] = Ov2Bilinear("bilinear") if interpolation in ("bicubic", "bilinear") else interpolation
    return ours


def train_transform(size: int | tuple[int, int], mean: Any, std: Any, aug: AugmentationCfg | None = None) -> T.Compose:
    """PIL image -> normalized float32 `(3, H, W)`, cropped at random from torch's default generator."""
    aug = aug or AugmentationCfg(scale=CROP_AREA)
    scale, ratio = _crop_ranges(aug)
    return T.Compose(
        [
            T.Lambda(_to_rgb),
            T.RandomResizedCrop(size, scale, ratio, interpolation=T.InterpolationMode.BILINEAR, antialias=True),
            *_jitter_steps(aug),
            T.ToTensor(),
            T.Normalize(mean=mean, std=std),
        ]
    )


def train_crop(preprocess_cfg: Mapping[str, Any], aug_cfg: Mapping[str, Any] | None, fast: bool) -> RandomCrop | None:
    """`train_transform` up to its ToTensor, for our loader: the same draws, uint8. None where the model's transform is
    not ours: another interpolation, or timm's augmentation.
    """
    if not isinstance(preprocess_cfg["interpolation"], Ov2Bilinear) or (aug_cfg and aug_cfg.get("use_timm")):
        return None
    aug, size = _augmentation(aug_cfg), preprocess_cfg["size"]
    steps = _jitter_steps(aug)
    jitter = T.Compose(steps) if steps else None
    draw = partial(_draw_box, *_crop_ranges(aug))
    return RandomCrop((size, size) if isinstance(size, int) else tuple(size), draw, jitter, fast)


def _draw_box(scale: tuple[float, float], ratio: tuple[float, float], width: int, height: int) -> Box:
    empty = torch.empty(0, height, width)  # torchvision asks it for its size alone
    top, left, box_height, box_width = T.RandomResizedCrop.get_params(empty, list(scale), list(ratio))
    return Box(left, top, box_width, box_height)


def _jitter_steps(aug: AugmentationCfg) -> list[Any]:
    steps: list[Any] = []
    if aug.color_jitter:
        steps.append(T.RandomApply([_color_jitter(aug)], p=aug.color_jitter_prob or JITTER_PROBABILITY))
    if aug.gray_scale_prob:
        steps.append(T.RandomGrayscale(p=aug.gray_scale_prob))
    return steps


def _crop_ranges(aug: AugmentationCfg) -> tuple[tuple[float, float], tuple[float, float]]:
    (low, high), ratio = aug.scale, aug.ratio or (3 / 4, 4 / 3)
    return (low, high), (ratio[0], ratio[1])


def _color_jitter(aug: AugmentationCfg) -> T.ColorJitter:
    jitter = aug.color_jitter or 0.0
    return T.ColorJitter(*((jitter,) * 3 if isinstance(jitter, (int, float)) else jitter))


def _augmentation(aug_cfg: Any) -> AugmentationCfg:
    """Raises ValueError for a key that OpenCLIP does not have."""
    if not isinstance(aug_cfg, Mapping):
        return aug_cfg or AugmentationCfg(scale=CROP_AREA)
    known = {field.name for field in fields(AugmentationCfg)}
    unknown = set(aug_cfg) - known
    if unknown:
        raise ValueError(f"unknown augmentation {sorted(unknown)} (known: {', '.join(sorted(known))})")
    return AugmentationCfg(**{"scale": CROP_AREA, **aug_cfg})


def _to_rgb(image: Any) -> Any:
    return image.convert("RGB")


def ov2_preprocess_options() -> dict[str, Any]:
    """What `create_model_and_transforms` gets so that any model sees the pixels that an ov2 model would."""
    return {
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "image_interpolation": Ov2Bilinear("bilinear"),
    }


def color_jitter_cfg() -> dict[str, Any]:
    """The `aug_cfg` of `--color-jitter`."""
    return {
        "color_jitter": JITTER,
        "color_jitter_prob": JITTER_PROBABILITY,
        "gray_scale_prob": GREY_PROBABILITY,
    }


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def supply_preprocess_cfg(original: Callable[..., None]) -> Callable[..., None]:
    def set_model_preprocess_cfg(model: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
        if isinstance(model, (CaptionModel, VisionModel)):
            preprocess_cfg |= ov2_preprocess_cfg(preprocess_cfg)  # in place: OpenCLIP logs the same dict afterwards
            logger.info("image preprocessing of the ov2 model: %s", preprocess_cfg)
        original(model, preprocess_cfg)

    return set_model_preprocess_cfg


def use_ov2_crop(original: Callable[..., Any]) -> Callable[..., Any]:
    def image_transform_v2(cfg: PreprocessCfg, is_train: bool, aug_cfg: Any = None) -> Any:
        uses_timm = isinstance(aug_cfg, dict) and aug_cfg.get("use_timm")
        if not is_train or uses_timm or not isinstance(cfg.interpolation, Ov2Bilinear):
            return original(cfg, is_train, aug_cfg)
        return train_transform(cfg.size, cfg.mean, cfg.std, _augmentation(aug_cfg))

    return image_transform_v2

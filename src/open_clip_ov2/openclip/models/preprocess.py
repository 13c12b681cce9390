"""Image preprocessing of ov2 models: ImageNet mean/std, bilinear; in training an inception crop.

Source: docs/reference.md, "Recipe": area 40% to 100%, bilinear with antialias, then color jitter and grayscale at
strength 0.4 with `--color-jitter`; evaluation resizes the short side to the resolution and crops the center. A value
that a call or a model's config gives is used as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from open_clip.transform import AugmentationCfg, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from torch import nn
from torchvision import transforms as T

from open_clip_ov2.core import CaptionModel, VisionModel, num_kept
from open_clip_ov2.data.crop import Box, RandomCrop, ToBudget, TokenBudget
from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.tables import each, real, whole

logger = logging.getLogger(__name__)

CROP_AREA = (0.4, 1.0)  # docs/reference.md: inception crop, area 40% to 100%
# SimCLR's jitter (arXiv 2002.05709, appendix A) at strength 0.4, each with its probability.
JITTER, JITTER_PROBABILITY = (0.32, 0.32, 0.32, 0.08), 0.8
COLOR_JITTER_CFG = {"color_jitter": JITTER, "color_jitter_prob": JITTER_PROBABILITY, "gray_scale_prob": 0.2}


class Ov2Interpolation(str):
    """The interpolation of an ov2 model. Its type, which travels in `preprocess_cfg`, tells OpenCLIP's transforms whose
    crop to use, however the model was made."""


def ov2_preprocess_cfg(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocess_cfg` of an ov2 model for which these values are given; None is not given."""
    ours = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear"}
    cfg = asdict(PreprocessCfg()) | ours | {key: value for key, value in given.items() if value is not None}
    return cfg | {"interpolation": Ov2Interpolation(cfg["interpolation"])}


def ov2_preprocess_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_model_and_transforms` gets so that any model sees the pixels that an ov2 model would see with the
    options `given`."""
    keys = ("mean", "std", "interpolation")
    cfg = ov2_preprocess_cfg({key: given.get(f"image_{key}") for key in keys})
    return {f"image_{key}": cfg[key] for key in keys}


def train_transform(cfg: PreprocessCfg, aug_cfg: Any = None) -> T.Compose:
    """PIL image -> normalized float32 `(3, H, W)`, cropped at random from torch's default generator."""
    crop = _random_crop(cfg.size, cfg.interpolation, aug_cfg, fast=False)
    to_rgb, to_float = methodcaller("convert", "RGB"), T.ConvertImageDtype(torch.float32)
    return T.Compose([to_rgb, crop, to_float, T.Normalize(mean=cfg.mean, std=cfg.std)])


def eval_transform(preprocess_cfg: Mapping[str, Any], budget: TokenBudget | None = None) -> T.Compose:
    """OpenCLIP's transform for evaluation, PIL image -> normalized float32 `(3, H, W)`, but with the configured
    interpolation for images that are not square too, where OpenCLIP's is bicubic whatever is asked for. With a budget
    images keep their shapes."""
    bilinear = preprocess_cfg["interpolation"] == "bilinear"
    if budget is not None:
        normalize = T.Normalize(mean=preprocess_cfg["mean"], std=preprocess_cfg["std"])
        return T.Compose([ToBudget(budget, "bilinear" if bilinear else "bicubic"), T.ToTensor(), normalize])
    transform: T.Compose = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    resize = transform.transforms[0]
    if isinstance(resize, ResizeKeepRatio):
        resize.interpolation = T.InterpolationMode.BILINEAR if bilinear else T.InterpolationMode.BICUBIC
    return transform


def native_budget(model: Any, max_tokens: int | None) -> TokenBudget:
    """The budget of images that keep their shapes, by default the tokens of the model's own grid. Raises UserError if
    token dropping would leave an image none."""
    rows, columns = model.visual.grid_size
    budget = TokenBudget(max_tokens or rows * columns, model.visual.conv1.kernel_size[0])
    if isinstance(model, CaptionModel):
        ratio = min(model.token_drop.keep_ratio.low, model.token_drop.eval_keep_ratio)
        try:
            num_kept(max(1, budget.most // 2), ratio)
        except ValueError:
            raise UserError(
                f"--max-tokens {budget.most}: an image may get half as many, of which a keep ratio of {ratio:g} keeps "
                "none; give more, or another --keep-ratio"
            ) from None
    return budget


def train_crop(
    preprocess_cfg: Mapping[str, Any], aug_cfg: Mapping[str, Any] | None, fast: bool, budget: TokenBudget | None = None
) -> RandomCrop | None:
    """`train_transform` up to its floats, for our loader: the same draws, uint8. None for timm's augmentation. With a
    budget the box has the image's own ratio, times one that is drawn as that of a square's box."""
    if aug_cfg and aug_cfg.get("use_timm"):
        return None
    return _random_crop(budget or preprocess_cfg["size"], preprocess_cfg["interpolation"], aug_cfg, fast)


def _random_crop(size: Any, interpolation: str, aug_cfg: Any, fast: bool) -> RandomCrop:
    """Raises ValueError for an augmentation that this crop does not have."""
    if not isinstance(aug_cfg, AugmentationCfg):
        check_aug_cfg(aug_cfg or {}, "ov2")
        aug_cfg = AugmentationCfg(**{"scale": CROP_AREA, **(aug_cfg or {})})
    scale, ratio, keeps_shape = aug_cfg.scale, aug_cfg.ratio or (3 / 4, 4 / 3), isinstance(size, TokenBudget)
    draw = partial(_draw_box, scale=tuple(scale), ratio=tuple(ratio), of_image=keeps_shape)
    sides = (size, size) if isinstance(size, int) else size if keeps_shape else (int(size[0]), int(size[1]))
    return RandomCrop(sides, draw, _jitter(aug_cfg), fast, str(interpolation))


def _draw_box(
    width: int, height: int, *, scale: tuple[float, ...], ratio: tuple[float, ...], of_image: bool = False
) -> Box:
    """`ratio` of width to height; with `of_image`, as many times the image's own."""
    ratio = tuple(one * width / height for one in ratio) if of_image else ratio
    empty = torch.empty(0, height, width)  # torchvision asks it for its size alone
    top, left, box_height, box_width = T.RandomResizedCrop.get_params(empty, list(scale), list(ratio))
    return Box(left, top, box_width, box_height)


def _jitter(aug: AugmentationCfg) -> T.Compose | None:
    steps: list[Any] = []
    if aug.color_jitter:
        strengths = (aug.color_jitter,) * 3 if isinstance(aug.color_jitter, (int, float)) else aug.color_jitter
        probability = JITTER_PROBABILITY if aug.color_jitter_prob is None else aug.color_jitter_prob
        steps.append(T.RandomApply([T.ColorJitter(*strengths)], p=probability))
    if aug.gray_scale_prob:
        steps.append(T.RandomGrayscale(p=aug.gray_scale_prob))
    return T.Compose(steps) if steps else None


# --- which keys of --aug-cfg have an effect --------------------------------------------------------------

_SHARE = real(0, 1)


def _pair(low: float, high: float = float("inf")) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        numbers = each(real(low, high, above=True))(value)
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            raise UserError(f"{value}: expected two numbers, the smaller one first")
        return numbers

    return read


def _strengths(value: Any) -> Any:
    numbers = each(real(0))(value if isinstance(value, (list, tuple)) else (value,) * 3)
    if len(numbers) not in (3, 4):
        raise UserError(f"{value}: expected a number, or 3 or 4 for brightness, contrast, saturation and hue")
    return numbers


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{value!r}: expected True or False")
    return value


_AUGMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "scale": _pair(0, 1),
    "ratio": _pair(0),
    "color_jitter": _strengths,
    "color_jitter_prob": _SHARE,
    "gray_scale_prob": _SHARE,
    "re_prob": _SHARE,
    "re_count": whole(1),
    "use_timm": _true_or_false,
}
# What a transform ignores, and what another key needs to have an effect.
_UNUSED = {
    "ov2": {"re_prob", "re_count"},
    "OpenCLIP": {"ratio", "re_prob", "re_count"},
    "timm": {"color_jitter_prob", "gray_scale_prob"},
}
_NEEDS = {
    "ov2": {"color_jitter_prob": "color_jitter"},
    "OpenCLIP": {"color_jitter_prob": "color_jitter", "color_jitter": "color_jitter_prob"},
    "timm": {"re_count": "re_prob"},
}


def check_aug_cfg(aug_cfg: Mapping[str, Any], transform: str) -> None:
    """Check the keys and values of --aug-cfg for the transform of `ov2` models or `OpenCLIP`'s own; with use_timm it is
    timm's. Raises ValueError for one that would have no effect."""
    given = {key: value for key, value in aug_cfg.items() if value is not None}
    transform = "timm" if given.get("use_timm") else transform
    for key, value in given.items():
        if key not in _AUGMENTATIONS:
            raise ValueError(str(unknown_key("augmentation", key, _AUGMENTATIONS)))
        try:
            numbers = _AUGMENTATIONS[key](value)
            if (key, transform) == ("color_jitter", "OpenCLIP") and len(numbers) != 4:
                raise UserError(f"{value}: OpenCLIP's transform expects 4 numbers")
            if key in _UNUSED[transform]:
                hint = "leave it or use_timm out" if transform == "timm" else "add use_timm=True"
                raise UserError(f"{transform}'s transform ignores it; {hint}")
            if (needed := _NEEDS[transform].get(key)) and needed not in given:
                raise UserError(f"it has no effect without {needed}")
        except UserError as error:
            raise ValueError(f"augmentation {key}: {error}") from None


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def leave_defaults_open(original: type[PreprocessCfg]) -> type[PreprocessCfg]:
    """None marks what neither a call nor a config gives until it is known whose model it is; OpenCLIP has its
    default."""

    @dataclass
    class OpenPreprocessCfg(original):
        mean: Any = None
        std: Any = None
        interpolation: Any = None

    return OpenPreprocessCfg


def supply_preprocess_cfg(original: Callable[..., None]) -> Callable[..., None]:
    """What is not given is ImageNet's mean and std and bilinear resizing for ov2 models, OpenCLIP's for all others."""

    def set_model_preprocess_cfg(model: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
        if isinstance(model, (CaptionModel, VisionModel)):
            preprocess_cfg |= ov2_preprocess_cfg(preprocess_cfg)  # in place: OpenCLIP logs the same dict afterwards
            logger.info("image preprocessing of the ov2 model: %s", preprocess_cfg)
        else:
            stock = asdict(PreprocessCfg())
            preprocess_cfg |= {key: stock[key] for key, value in preprocess_cfg.items() if value is None}
        original(model, preprocess_cfg)

    return set_model_preprocess_cfg


def use_ov2_crop(original: Callable[..., Any]) -> Callable[..., Any]:
    """ov2 models get the crop and the interpolation they ask for; OpenCLIP crops 90 to 100% of the area, bicubic, and
    resizes for images that are not square bicubic, whatever is asked for."""

    def image_transform_v2(cfg: PreprocessCfg, is_train: bool, aug_cfg: Any = None) -> Any:
        if not isinstance(cfg.interpolation, Ov2Interpolation):
            return original(cfg, is_train, aug_cfg)
        if not is_train:
            return eval_transform(asdict(cfg))
        if isinstance(aug_cfg, Mapping) and aug_cfg.get("use_timm"):
            check_aug_cfg(aug_cfg, "ov2")
            return original(cfg, is_train, {"scale": CROP_AREA, **aug_cfg})
        return train_transform(cfg, aug_cfg)

    return image_transform_v2

"""Uint8 crops normalised on the device. Oracles: torchvision's steps, and what `create_model_and_transforms` gives."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from open_clip_ov2.core.compute import Compute
from open_clip_ov2.openclip.models.preprocess import COLOR_JITTER_CFG, JITTER, train_crop

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def settings(precision: str = "fp32", **stats: tuple[float, ...]) -> Compute:
    return Compute(torch.device("cpu"), precision, 1, 2, **stats)


@pytest.mark.parametrize(
    ("aug_cfg", "scale", "jitter"),
    [
        (None, (0.4, 1.0), []),
        (COLOR_JITTER_CFG, (0.4, 1.0), [T.RandomApply([T.ColorJitter(*JITTER)], 0.8), T.RandomGrayscale(0.2)]),
        ({"scale": (0.1, 0.3), "color_jitter": 0.3}, (0.1, 0.3), [T.RandomApply([T.ColorJitter(0.3, 0.3, 0.3)], 0.8)]),
    ],
)
@pytest.mark.parametrize("stats", [{}, {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}])
def test_it_is_the_float_transform_bit_for_bit(
    aug_cfg: dict[str, object] | None, scale: tuple[float, float], jitter: list[object], stats: dict[str, object]
) -> None:
    model, train_tf, _ = open_clip.create_model_and_transforms("ov2-vit-nano-8", aug_cfg=aug_cfg, **stats)
    cfg = model.visual.preprocess_cfg
    crop = train_crop(cfg, aug_cfg, fast=False)
    assert crop is not None
    resized = T.RandomResizedCrop(cfg["size"], scale, interpolation=T.InterpolationMode.BILINEAR)
    torchvisions = T.Compose([resized, *jitter, T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])])
    rows, expected = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        expected.append(torchvisions(IMAGE))
        torch.manual_seed(seed)
        assert torch.equal(train_tf(IMAGE), expected[-1])
        torch.manual_seed(seed)
        rows.append(crop(IMAGE))
    images = torch.stack(rows)
    assert images.dtype == torch.uint8
    ours = settings(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))
    assert torch.equal(ours.pixels(images), torch.stack(expected))
    halves = settings("pure_bf16", mean=tuple(cfg["mean"]), std=tuple(cfg["std"])).pixels(images)
    assert torch.equal(halves, torch.stack(expected).bfloat16())


def test_floats_are_taken_as_normalised_and_uint8_needs_the_statistics() -> None:
    """Oracle: the tensor put in; the error's words."""
    floats = torch.randn(2, 3, 4, 4)
    assert torch.equal(settings(mean=(0.5,) * 3, std=(0.5,) * 3).pixels(floats), floats)
    with pytest.raises(ValueError, match="no mean and std"):
        settings().pixels(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_other_transforms_stay_as_they_are() -> None:
    """Oracle: none is replaced where timm's augmentation is asked for."""
    cfg = open_clip.create_model("ov2-vit-nano-8").visual.preprocess_cfg
    assert train_crop(cfg, {"use_timm": True}, fast=True) is None
    with pytest.raises(ValueError, match="did you mean scale"):
        train_crop(cfg, {"scael": (0.1, 1.0)}, fast=True)

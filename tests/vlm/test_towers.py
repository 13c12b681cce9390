"""Encoders of other libraries as towers of LLaVA. Oracle: their own library's tokens after each block, within 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch

import open_clip_ov2  # noqa: F401  (registers the baselines)
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.encoder import Preprocessing
from open_clip_ov2.vlm.towers import of_open_clip, of_timm, open_tower

PRE = Preprocessing((0.5,) * 3, (0.5,) * 3)
SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """With weights that show every mistake of place and scale."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def assert_same_tokens(tower, expected: dict[int, torch.Tensor], images: torch.Tensor) -> None:
    with torch.no_grad():
        states = tower.model.eval()(images, output_hidden_states=True).hidden_states
    for layer, tokens in expected.items():
        patches = states[layer][:, int(tower.class_token) :]
        assert patches.shape[1] == tower.num_tokens
        torch.testing.assert_close(patches, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_clip_and_coca(quick: bool, pooled: bool) -> None:
    act = open_clip.transformer.QuickGELU if quick else torch.nn.GELU
    visual = spread(
        open_clip.transformer.VisionTransformer(
            28, 7, 32, 3, 2, 4.0, output_dim=16, act_layer=act, attentional_pool=pooled, attn_pooler_heads=2
        )
    )
    images = torch.randn(2, 3, 28, 28)
    found = visual.forward_intermediates(images, indices=[1, 2], output_fmt="NLC")["image_intermediates"]
    assert_same_tokens(of_open_clip(visual, PRE), {-2: found[0], -1: found[1]}, images)


@pytest.mark.parametrize("name", ["clip-of-ov2-vit-nano-8", "coca-of-ov2-vit-nano-8"])
def test_baselines_of_ours(name: str) -> None:
    """They have no norm before their blocks."""
    model: Any = open_clip.create_model(name, force_image_size=32)
    images = torch.randn(2, 3, 32, 32)
    visual = spread(model.visual)
    found = visual.forward_intermediates(images, indices=[1, 3], output_fmt="NLC")["image_intermediates"]
    tower = of_open_clip(visual, PRE)
    assert type(tower.model).__name__ == "ViTModel"
    assert_same_tokens(tower, {2: found[0], -1: found[1]}, images)


@pytest.mark.parametrize("class_token", [True, False])
def test_timm(class_token: bool) -> None:
    act = "gelu" if class_token else "gelu_tanh"
    pool = "token" if class_token else "map"
    trunk = spread(
        timm.models.VisionTransformer(**SIZES, class_token=class_token, global_pool=pool, act_layer=act, num_classes=0)
    )
    images = torch.randn(2, 3, 28, 28)
    found = trunk.forward_intermediates(images, indices=[1, 2], output_fmt="NLC", intermediates_only=True)
    tower = of_timm(trunk, PRE)
    assert (type(tower.model).__name__, tower.class_token) == (
        ("ViTModel", True) if class_token else ("SiglipVisionModel", False)
    )
    assert_same_tokens(tower, {-2: found[0], -1: found[1]}, images)


def test_a_clip_of_transformers_in_a_folder(tmp_path: Path) -> None:
    """Oracle: transformers itself, from the whole CLIP."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 7}
    clip = spread(
        CLIPModel(CLIPConfig(vision_config=vision, text_config={**sizes, "vocab_size": 30}, projection_dim=8))
    )
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = clip.vision_model(images, output_hidden_states=True).hidden_states
    tower = open_tower(str(tmp_path))
    assert tower.class_token
    assert_same_tokens(tower, {layer: states[layer][:, 1:] for layer in (-2, -1)}, images)


def test_sides_of_a_vit_may_be_lists(tmp_path: Path) -> None:
    """Oracle: transformers' own hidden states; parameters without a gradient are found on images of these sides."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vit = spread(ViTModel(ViTConfig(**sizes, image_size=[28, 28], patch_size=7), add_pooling_layer=False))
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = vit(images, output_hidden_states=True).hidden_states
    tower = open_tower(str(tmp_path))
    assert_same_tokens(tower, {-2: states[-2][:, 1:]}, images)
    assert tower.model.config.image_size == 28


def test_what_transformers_has_no_class_for_is_refused() -> None:
    scaled = timm.models.VisionTransformer(**SIZES, init_values=1e-5)
    with pytest.raises(Exception, match=r"its blocks have ls1\.gamma"):
        of_timm(scaled, PRE)
    with pytest.raises(UserError, match=r"no such|not a|cannot"):
        open_tower("no-such-encoder")

"""CoCa and CLIP around the encoder of an ov2 model. Oracles: the ov2 model; OpenCLIP's own configs for L/14."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import open_clip_ov2
from open_clip_ov2.openclip.models.baseline_configs import clip_of, coca_of
from open_clip_ov2.openclip.models.factory import MODEL_CONFIGS

NAMES = sorted(path.stem for path in MODEL_CONFIGS.glob("*.json"))


def made(name: str) -> Any:
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta", load_weights=False)


def encoder_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in made(name).visual.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_baselines_have_the_same_encoder(name: str) -> None:
    """Key by key; heads alone differ (proj; CoCa's ln_post comes after its pooler)."""
    ours = encoder_shapes(name)
    coca, clip = encoder_shapes(f"coca-of-{name}"), encoder_shapes(f"clip-of-{name}")
    heads = {"proj", "ln_post.weight", "ln_post.bias"}
    shared = {key: shape for key, shape in ours.items() if key not in heads}
    assert len(shared) > 50
    assert {**clip, "proj": ours["proj"]} == ours
    pooler = {key for key in coca if key.startswith("attn_pool.")}
    assert {key: shape for key, shape in coca.items() if key not in heads | pooler} == shared
    assert pooler


@pytest.mark.parametrize("name", ["ov2-vit-nano-8", "ov2-vit-so400m-14"])
def test_heads_and_norms_are_the_same_too(name: str) -> None:
    """What shapes do not show."""
    for other in (f"coca-of-{name}", f"clip-of-{name}"):
        ours, theirs = made(name).visual, made(other).visual
        assert theirs.image_size == ours.image_size
        for block, same in zip(ours.transformer.resblocks, theirs.transformer.resblocks, strict=True):
            assert same.attn.num_heads == block.attn.num_heads
            assert same.ln_1.eps == block.ln_1.eps == 1e-6


@pytest.mark.parametrize(("kind", "stock"), [("coca", "coca_ViT-L-14"), ("clip", "ViT-L-14")])
def test_those_of_l_14_are_stock_but_for_what_is_said(kind: str, stock: str) -> None:
    a, b = made(f"{kind}-of-ov2-vit-l-14"), made(stock)
    assert type(a) is type(b)
    ours, theirs = ({key: value.shape for key, value in model.state_dict().items()} for model in (a, b))
    assert {key for key in theirs if key not in ours} == {"visual.ln_pre.weight", "visual.ln_pre.bias"}
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing == {"text.positional_embedding" if kind == "coca" else "positional_embedding"}  # longer
    if kind == "coca":
        assert a.text_decoder.attn_mask.shape == (128, 128)


def test_they_run_on_the_captions_of_the_ov2_model() -> None:
    ids_BL = open_clip.get_tokenizer("ov2-vit-nano-8")(["a dog", "two cats"])
    for kind in ("coca", "clip"):
        name = f"{kind}-of-ov2-vit-nano-8"
        assert torch.equal(open_clip.get_tokenizer(name)(["a dog", "two cats"]), ids_BL)
        model = open_clip.create_model(name, output_dict=True)
        assert type(model).__name__.lower() == kind
        out = model(torch.rand(2, 3, 64, 64), ids_BL)
        assert out["image_features"].shape == out["text_features"].shape == (2, 192)
        if kind == "coca":
            labels = out.get("labels", ids_BL)  # OpenCLIP 4's CoCa has no labels, and logits for every position
            assert out["logits"].shape[1] == labels.shape[1] == ids_BL.shape[1] - ("labels" in out)


def test_text_is_pooled_where_it_ends() -> None:
    """Upstream's default takes the largest id, which is the end of text only in OpenAI's vocabulary."""
    config = open_clip.get_model_config("ov2-vit-nano-8")
    assert "pool_type" not in clip_of(config)["text_cfg"]
    config["text_cfg"].update(vocab_size=100, bos_id=1, eos_id=2)
    assert clip_of(config)["text_cfg"]["eos_id"] == 2
    assert clip_of(config)["text_cfg"]["pool_type"] == "eos"


def test_they_go_with_the_ov2_models() -> None:
    def registered() -> list[str]:
        names = {f"{kind}-of-{name}" for kind in ("clip", "coca") for name in NAMES}  # `ov2 bench` adds others
        return [name for name in open_clip.list_models() if name in names]

    assert len(registered()) == 2 * len(NAMES)
    try:
        open_clip_ov2.unregister()
        assert registered() == []
    finally:
        open_clip_ov2.register()
    assert len(registered()) == 2 * len(NAMES)
    assert open_clip.list_models().index("coca-of-ov2-vit-l-14") > open_clip.list_models().index("clip-of-ov2-vit-l-14")


def test_the_studys_coca_is_the_baseline_with_fewer_queries() -> None:
    """Oracle: `coca-of-ov2-vit-nano-8`'s own config. 16 patches of 32 px, and a query for the contrastive embedding."""
    folder = Path(__file__).parents[2] / "configs" / "compare" / "models" / "coca-of-ov2-nano-17-queries"
    expected = coca_of(json.loads((MODEL_CONFIGS / "ov2-vit-nano-8.json").read_text()))
    expected["vision_cfg"]["attn_pooler_queries"] = 17
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] == expected

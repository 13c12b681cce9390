"""Which multimodal classes of transformers take our encoder as their vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import export_fixtures
import pytest
import torch
import transformers
from transformers import LlamaConfig

from open_clip_ov2.formats.llava import VisionTower
from open_clip_ov2.vlm.towers import open_tower

CLASSES = ["Llava", "LlavaNext", "LlavaOnevision", "VipLlava"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> VisionTower:
    folder = tmp_path_factory.mktemp("classes")
    export_fixtures.make_run(folder / "encoder")
    return open_tower(str(folder / "encoder"))


def model_of(family: str, tower: VisionTower) -> Any:
    """The class with our tower and a tiny language model, in evaluation mode."""
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    layers = {"vision_feature_layers": [-1]} if family == "VipLlava" else {"vision_feature_layer": -1}
    config = getattr(transformers, f"{family}Config")(
        vision_config=tower.model.config, text_config=text, image_token_index=63, image_token_id=63, **layers,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.model.vision_tower.load_state_dict(tower.model.state_dict())
    return model


@pytest.mark.parametrize("family", CLASSES)
def test_the_class_keeps_our_tower(family: str, tower: VisionTower, tmp_path: Path) -> None:
    """Oracle: the tokens of our tower, before and after saving and a strict reload."""
    model = model_of(family, tower)
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not {*report["missing_keys"], *report["unexpected_keys"]}
    pixels = torch.randn(2, 3, tower.image_size, tower.image_size)
    with torch.no_grad():
        expected = tower.model(pixels).last_hidden_state
        for one in (model, again):
            torch.testing.assert_close(one.model.vision_tower(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)

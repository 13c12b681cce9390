"""CLIP and CoCa with the same word pieces and the same pixels as an ov2 model. Oracles are named at each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training import data_flags, results

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core import IGNORE_INDEX, caption_targets
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.open_model import open_model
from open_clip_ov2.openclip.models.preprocess import COLOR_JITTER_CFG, ov2_preprocess_options
from open_clip_ov2.openclip.models.tokenizer import EOS_ID, PAD_ID, WordPieceTokenizer, text_cfg_for, text_options

NAMES = {"coca": "coca-of-ov2-vit-nano-8", "clip": "clip-of-ov2-vit-nano-8"}
SIZE = {"force_image_size": 24}


@pytest.fixture(scope="module", params=NAMES)
def run(
    request: pytest.FixtureRequest, squares: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Trained with word pieces of the squares' captions and the transform of ov2 models."""
    logs = tmp_path_factory.mktemp("logs")
    flags = ["--model", NAMES[request.param], "--tokenizer", str(vocabulary), "--augmentation", "family"]
    shape = ["--force-image-size", "24", "--force-context-length", "12", "--color-jitter", "--logs", str(logs)]
    assert ov2(["train", *flags, *shape, *data_flags(squares), "--name", request.param]) == 0
    return logs / request.param


def test_pixels_are_those_of_an_ov2_model() -> None:
    """Oracle: the ov2 model's own transforms, from the same seed, bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    made = []
    ours: dict[str, Any] = {"aug_cfg": COLOR_JITTER_CFG}
    for name, more in (
        ("ov2-vit-nano-8", ours),
        (NAMES["clip"], ours | ov2_preprocess_options({})),
        (NAMES["clip"], {}),
    ):
        transforms = open_clip.create_model_and_transforms(name, **SIZE, **more)[1:]
        images = []
        for transform in transforms:
            torch.manual_seed(1)
            images.append(transform(picture))
        made.append(images)
    ours, same, stock = made
    assert torch.equal(ours[0], same[0])
    assert torch.equal(ours[1], same[1])
    assert not torch.equal(ours[1], stock[1])


def test_the_folder_says_all(run: Path, vocabulary: Path) -> None:
    """Oracle: the constants of ov2 models; OpenCLIP's own loader and tokenizer."""
    config = json.loads((run / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert config["preprocess_cfg"]["interpolation"] == "bilinear"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{run}")
    assert isinstance(tokenizer, WordPieceTokenizer)
    text = getattr(model, "text", model)
    assert text.token_embedding.num_embeddings == text_cfg_for(str(vocabulary), 12)["vocab_size"] < 49408


def test_text_ends_at_eos(run: Path) -> None:
    """Oracle: causality. What stands behind a CLIP caption's end changes nothing, though it would where the largest id
    is pooled; CoCa's class token sees all but [PAD], so its embedding changes nothing."""
    loaded = open_model(run)
    model: Any = loaded.model
    texts_BL = loaded.tokenizer(["a red square"])
    assert texts_BL[0, -1] == PAD_ID
    before = model.encode_text(texts_BL)
    if run.name == "coca":
        with torch.no_grad():
            model.text.token_embedding.weight[PAD_ID] += 1
        assert torch.allclose(model.encode_text(texts_BL), before, atol=1e-6)
        return
    texts_BL[0, -1] = loaded.tokenizer.vocab_size - 1
    assert torch.equal(model.encode_text(texts_BL), before)
    model.text_pool_type = "argmax"
    assert not torch.allclose(model.encode_text(texts_BL), before, atol=1e-2)


def test_cocas_caption_loss_knows_the_end(run: Path, squares: Path) -> None:
    """Oracle: one forward pass over the whole set, F.cross_entropy up to the first eos, which is 2 and not 49407."""
    if run.name == "clip":
        assert "caption_loss" not in results(run, "val")[-1]
        return
    loaded = open_model(run)
    source = WebDatasetSource((f"{squares}/val/00000.tar",))
    keys = parse_caption_keys("txt")
    loader = EvalLoader(source, loaded.preprocess, loaded.tokenizer, batch_size=10, num_workers=0, caption_keys=keys)
    (batch,) = loader
    logits = loaded.model(batch.images_BCHW, batch.texts_BL)["logits"]
    labels = caption_targets(batch.texts_BL, EOS_ID)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    assert results(run, "val")[-1]["caption_loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_text_tower_of_the_hub_keeps_its_tokenizer(vocabulary: Path) -> None:
    config = open_clip.get_model_config("roberta-ViT-B-32")
    assert config is not None
    with pytest.raises(UserError, match="tokenizer of its own"):
        text_options("roberta-ViT-B-32", config, text_cfg_for(str(vocabulary), 12))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--color-jitter"], "--augmentation family gives it their transform"),
        (
            ["--augmentation", "family", "--color-jitter", "--aug-cfg", "use_timm=True"],
            "--color-jitter with --aug-cfg use_timm=True: give timm",
        ),
    ],
)
def test_slips(flags: list[str], message: str, squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ov2(["train", "--model", NAMES["clip"], *data_flags(squares), *flags]) == 2
    assert message in capsys.readouterr().err

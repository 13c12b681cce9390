"""Which multimodal classes of transformers take our encoder as their vision tower: the table of docs/vlm.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import export_fixtures
import open_clip
import pytest
import torch
import transformers
from torch import Tensor, nn

from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.hf import state_dict
from open_clip_ov2.formats.llava import VisionTower, vision_tower

IMAGE = 63
WORDS = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**WORDS, "intermediate_size": 48, "num_key_value_heads": 2}
COHERE = transformers.Cohere2Config(**LLAMA, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIDE, PATCHES = 56, 16  # of the fixture's encoder: 4 x 4 patches
GRIDS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
NEWLINES = PATCHES + 4 * PATCHES + 8  # the picture, its four parts, and a newline after each of their 8 rows
# Class -> its settings, and how many tokens stand for a picture.
TAKE: dict[str, tuple[dict[str, Any], int]] = {
    "Llava": ({"vision_feature_layer": -1}, PATCHES),
    "VipLlava": ({"vision_feature_layers": [-1]}, PATCHES),
    "LlavaNext": ({"vision_feature_layer": -1, **GRIDS}, NEWLINES),
    "LlavaOnevision": ({"vision_feature_layer": -1, "vision_feature_select_strategy": "default", **GRIDS}, NEWLINES),
    "AyaVision": (
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "text_config": COHERE}, PATCHES // 4
    ),
    "PaliGemma": ({"text_config": transformers.GemmaConfig(**LLAMA, head_dim=16), "projection_dim": 32}, PATCHES + 1),
}  # fmt: skip
GEMMA = transformers.Gemma3TextConfig(**LLAMA, head_dim=16)
REFUSE = {  # because of the class token, or of pictures of any size
    "Gemma3": ({"text_config": GEMMA, "mm_tokens_per_image": 4}, 4),
    "Cohere2Vision": ({"text_config": COHERE, "downsample_factor": 2}, PATCHES // 4),
    "Mistral3": ({"text_config": transformers.MistralConfig(**LLAMA), "vision_feature_layer": -1}, PATCHES // 4),
}
# Names in the export of `--to hf` -> those of a class that has the same blocks under others.
BLIP2 = {
    r"embeddings\.cls_token": "embeddings.class_embedding",
    r"embeddings\.position_embeddings": "embeddings.position_embedding",
    r"embeddings\.patch_embeddings\.projection": "embeddings.patch_embedding",
    r"encoder\.layer\.": "encoder.layers.",
    r"attention\.attention\.query": "self_attn.qkv",  # query, key and value below each other
    r"attention\.output\.dense": "self_attn.projection",
    r"intermediate\.dense": "mlp.fc1",
    r"(layers\.\d+)\.output\.dense": r"\1.mlp.fc2",
    r"layernorm_before": "layer_norm1",
    r"layernorm_after": "layer_norm2",
    r"^layernorm": "post_layernorm",
}
INTERNVL = {
    r"attention\.attention\.(query|key|value)": lambda found: f"attention.{found[1][0]}_proj",
    r"attention\.output\.dense": "attention.projection_layer",
    r"intermediate\.dense": "mlp.fc1",
    r"(layer\.\d+)\.output\.dense": r"\1.mlp.fc2",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    model = export_fixtures.make_run(tmp_path_factory.mktemp("classes") / "encoder").model
    return Encoder.of(model.visual, open_clip.get_model_preprocess_cfg(model))


@pytest.fixture(scope="module")
def tower(encoder: Encoder) -> VisionTower:
    return vision_tower(encoder)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(tower: VisionTower, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return tower.model.eval()(pixels).last_hidden_state


def model_of(family: str, vision_config: Any, settings: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    text = {"text_config": transformers.LlamaConfig(**LLAMA), "image_token_index": IMAGE, "image_token_id": IMAGE}
    config = getattr(transformers, f"{family}Config")(**{**text, **settings}, vision_config=vision_config)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def reloaded(model: Any, folder: Path) -> Any:
    """After saving and a strict reload."""
    model.save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    return again


def batch(family: str, tokens: int, pixels: Tensor) -> dict[str, Tensor]:
    """A picture and six words in each of two rows."""
    ids = torch.cat([torch.full((2, tokens), IMAGE), torch.arange(1, 13).view(2, 6)], dim=1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids == IMAGE, -100)}
    if family in ("LlavaNext", "LlavaOnevision"):
        sizes = torch.tensor([[2 * SIDE, 2 * SIDE]] * 2)
        return {**made, "pixel_values": pixels[:, None].repeat(1, 5, 1, 1, 1), "image_sizes": sizes}
    if family in ("PaliGemma", "Gemma3"):
        made["token_type_ids"] = (ids != IMAGE).long()
    if family == "Mistral3":
        made["image_sizes"] = torch.tensor([[SIDE, SIDE]] * 2)
    return {**made, "pixel_values": pixels}


def assert_trains(model: Any, inputs: Mapping[str, Tensor], tower: nn.Module) -> None:
    """A step along the gradient lowers the loss, and reaches the first weights of the encoder."""
    model.train()
    first = model(**inputs).loss
    first.backward()
    gradient = next(value for name, value in tower.named_parameters() if "patch_emb" in name).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert model(**inputs).loss < first


@pytest.mark.parametrize("family", TAKE)
def test_the_class_takes_our_tower(
    family: str, tower: VisionTower, pixels: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    """Oracle: our encoder's tokens after a strict reload of the whole model; the loss goes down in a training step."""
    settings, tokens = TAKE[family]
    model = model_of(family, tower.model.config, settings)
    model.model.vision_tower.load_state_dict(tower.model.state_dict())
    again = reloaded(model, tmp_path)
    with torch.no_grad():
        found = again.model.vision_tower.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_trains(again, batch(family, tokens, pixels), again.model.vision_tower)


def test_vision_encoder_decoder(tower: VisionTower, pixels: Tensor, expected: Tensor, tmp_path: Path) -> None:
    """The same for transformers' captioner, whose decoder looks at the tokens by cross-attention."""
    words = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, is_decoder=True, add_cross_attention=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tower.model.config, words)
    model = transformers.VisionEncoderDecoderModel(config)
    model.encoder.load_state_dict(tower.model.state_dict())
    again = reloaded(model, tmp_path)
    again.config.decoder_start_token_id, again.config.pad_token_id = 1, 0
    with torch.no_grad():
        found = again.encoder.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_trains(again, {"pixel_values": pixels, "labels": torch.arange(1, 13).view(2, 6)}, again.encoder)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        for pattern, theirs in names.items():
            name = re.sub(pattern, theirs, name)
        found[name] = value
    return found


def sizes_of(config: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    return {name: getattr(config, name) for name in (*names, "layer_norm_eps", "image_size", "patch_size")}


def test_internvl_takes_our_weights_under_its_names(
    encoder: Encoder, tower: VisionTower, pixels: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    """Oracle as above. Its config makes an InternVLVisionModel of any tower, whose layer scale has to be one."""
    vision = transformers.InternVLVisionConfig(
        **sizes_of(tower.model.config), attention_bias=True, use_mean_pooling=False, layer_scale_init_value=1.0
    )
    model = model_of("InternVL", vision, {"vision_feature_layer": -1})
    lost = model.model.vision_tower.load_state_dict(renamed(state_dict(encoder), INTERNVL), strict=False)
    assert {name.rpartition(".")[2] for name in lost.missing_keys} == {"lambda_1", "lambda_2"}
    assert all("pooler" in name for name in lost.unexpected_keys)
    again = reloaded(model, tmp_path)
    with torch.no_grad():
        found = again.model.vision_tower.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_trains(again, batch("InternVL", PATCHES // 4, pixels), again.model.vision_tower)


def test_blip2_takes_our_weights_under_its_names(
    encoder: Encoder, tower: VisionTower, pixels: Tensor, expected: Tensor, tmp_path: Path
) -> None:
    """Oracle as above. MiniGPT-4's first half: the encoder of BLIP-2 and its Q-Former."""
    state = state_dict(encoder)
    for query in [name for name in state if "attention.query" in name]:
        state[query] = torch.cat([state.pop(query.replace("query", part)) for part in ("query", "key", "value")])
    vision = transformers.Blip2VisionConfig(**sizes_of(tower.model.config))
    former = {**WORDS, "intermediate_size": 48, "encoder_hidden_size": vision.hidden_size}
    words = transformers.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                   num_attention_heads=2, word_embed_proj_dim=32)  # fmt: skip
    settings = {"qformer_config": former, "text_config": words, "num_query_tokens": 3}
    model = model_of("Blip2", vision, settings)
    lost = model.vision_model.load_state_dict(renamed(state, BLIP2), strict=False)
    assert not lost.missing_keys
    assert all("pooler" in name for name in lost.unexpected_keys)
    again = reloaded(model, tmp_path)
    with torch.no_grad():
        found = again.vision_model.eval()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_trains(again, batch("Blip2", 3, pixels), again.vision_model)


@pytest.mark.parametrize("family", REFUSE)
def test_the_class_cannot_use_our_tower(family: str, tower: VisionTower, pixels: Tensor) -> None:
    """Oracle: transformers' own error at the first picture: one token too many, or one argument."""
    settings, tokens = REFUSE[family]
    model = model_of(family, tower.model.config, settings)
    with pytest.raises((RuntimeError, TypeError), match=r"shape|split_sizes|unexpected keyword"):
        model(**batch(family, tokens, pixels))


@pytest.mark.parametrize("family", ["Idefics3", "SmolVLM"])
def test_the_class_has_a_tower_of_its_own(family: str, tower: VisionTower) -> None:
    """Oracle: whatever the config says, its tower has no place for the class token, which our patches attend to."""
    model = model_of(family, sizes_of(tower.model.config), {"scale_factor": 2})
    shapes = [tuple(value.shape) for value in model.model.vision_model.embeddings.parameters()]
    width = tower.model.config.hidden_size
    assert sorted(shapes) == sorted([(width,), (width, 3, 14, 14), (PATCHES, width)])


def test_the_table_lists_what_is_tested_here() -> None:
    """Oracle: the table of docs/vlm.md."""
    section = Path("docs/vlm.md").read_text().partition("## Other classes of transformers")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    others = {"VisionEncoderDecoder", "InternVL", "Blip2", "Idefics3", "SmolVLM"}
    assert named == {*TAKE, *REFUSE, *others}

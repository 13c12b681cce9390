"""Released encoders through OpenCLIP's own functions. Oracle: the same encoder computed plainly (released_files.py)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from released_files import PATCH, SHAPES, config, encoder_state, plain_encoder, plain_table, write_released

import open_clip_ov2
from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.openclip.models.factory import complete_vision_cfg

TIGHT = {"atol": 2e-5, "rtol": 1e-5}


def images(size: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SHAPES)
def released(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict]:
    return request.param, tmp_path, write_released(tmp_path, request.param)


def test_every_way_of_making_a_model_gives_the_encoder(released, caplog: pytest.LogCaptureFixture) -> None:
    size, folder, state = released
    after, pooled = plain_encoder(state, SHAPES[size][2], images())
    with caplog.at_level(logging.INFO):
        made = [
            open_clip.create_model(f"local-dir:{folder}"),
            open_clip.create_model_and_transforms(f"local-dir:{folder}")[0],
            open_clip.create_model_from_pretrained(f"local-dir:{folder}")[0],
        ]
    for model in made:
        assert isinstance(model, VisionModel)
        with torch.no_grad():
            torch.testing.assert_close(model.eval().encode_image_tokens(images()), after[-1][:, 1:], **TIGHT)
            torch.testing.assert_close(model.encode_image(images()), pooled, **TIGHT)
            assert torch.equal(model(images())["image_embs"], model.encode_image_tokens(images()))
        assert torch.equal(model.state_dict()["visual.conv1.weight"], state["conv1.weight"])
    assert f"loaded all {len(state)} encoder keys" in caplog.text
    assert "(0.485, 0.456, 0.406)" in caplog.text  # what is supplied is shown


def test_preprocessing_is_supplied(tmp_path: Path) -> None:
    """Oracle: reference.md, "ImageNet mean/std, bilinear, short side + centre crop"."""
    write_released(tmp_path, "l")
    _, train, val = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    text = str(val)
    assert "Resize(size=56, interpolation=bilinear" in text
    assert "CenterCrop" in text
    for transform in (train, val):
        assert "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)" in str(transform)
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a cat"]).shape == (1, 77)


@pytest.mark.parametrize("mode", ["interpolate", "recompute"])
def test_another_resolution(mode: str, tmp_path: Path) -> None:
    """Oracles: torch's bicubic interpolation of the stored grid, and the table computed number by number."""
    state = write_released(tmp_path, "l")
    model = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=84, position_table=mode).eval()
    stored, side = state["positional_embedding"], 84 // PATCH
    if mode == "recompute":
        table = plain_table(side, stored.shape[1])
    else:
        grid = stored[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        table = torch.cat([stored[:1], grid.permute(0, 2, 3, 1).reshape(side**2, -1)])
    torch.testing.assert_close(model.visual.positional_embedding.data, table, atol=1e-6, rtol=0)
    after, _ = plain_encoder({**state, "positional_embedding": table}, 16, images(84))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image_tokens(images(84)), after[-1][:, 1:], **TIGHT)


def test_a_stored_table_that_is_no_sine_is_taken_as_it_is(tmp_path: Path) -> None:
    state = write_released(tmp_path, "l")
    state["positional_embedding"] = torch.randn(17, 64)
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(model.visual.positional_embedding.data, state["positional_embedding"])


def nano_state(seed: int = 3) -> dict[str, torch.Tensor]:
    """The bare encoder of ov2-vit-nano-8 with weights of its own."""
    torch.manual_seed(seed)
    model = open_clip.create_model("ov2-vit-nano-8", decoder_cfg=None)
    assert isinstance(model, VisionModel)
    for name, parameter in model.visual.named_parameters():
        if name != "positional_embedding":
            torch.nn.init.normal_(parameter, std=0.05)
    return {key: value.clone() for key, value in model.visual.state_dict().items()}


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_bare_file_goes_into_a_model_of_ours_encoder_only(suffix: str, tmp_path: Path, caplog) -> None:
    """Oracles: the file's tensors; the decoder that the same seed gives without the file."""
    from safetensors.torch import save_file

    state, file = nano_state(), tmp_path / f"encoder.{suffix}"
    torch.save(state, file) if suffix == "bin" else save_file(state, str(file))
    torch.manual_seed(0)
    fresh = open_clip.create_model("ov2-vit-nano-8").state_dict()
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO):
        model = open_clip.create_model("ov2-vit-nano-8", pretrained=str(file), force_image_size=64)
    assert isinstance(model, CaptionModel)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[f"visual.{key}"], value) for key, value in state.items())
    assert all(torch.equal(loaded[key], fresh[key]) for key in fresh if key.startswith("text_decoder."))
    assert f"loaded all {len(state)} encoder keys" in caplog.text
    assert "the text decoder starts from new weights" in caplog.text
    larger = open_clip.create_model("ov2-vit-nano-8", pretrained=str(file), force_image_size=96)
    torch.testing.assert_close(larger.visual.positional_embedding.data, plain_table(12, 192), atol=1e-6, rtol=0)


def test_an_encoder_file_on_top_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    """Oracles: the file's tensors; the decoder of --pretrained; a key that is missing."""
    state, whole = nano_state(), open_clip.create_model("ov2-vit-nano-8").state_dict()
    torch.save(state, tmp_path / "encoder.bin")
    torch.save(whole, tmp_path / "whole.pt")
    paths = {"pretrained": str(tmp_path / "whole.pt"), "pretrained_image_path": str(tmp_path / "encoder.bin")}
    model, _, _ = open_clip.create_model_and_transforms("ov2-vit-nano-8", **paths)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[f"visual.{key}"], value) for key, value in state.items())
    assert all(torch.equal(loaded[key], whole[key]) for key in whole if key.startswith("text_decoder."))
    torch.save({key: value for key, value in state.items() if key != "ln_post.bias"}, tmp_path / "encoder.bin")
    with pytest.raises(ValueError, match=r"1 missing \(visual\.ln_post\.bias\)"):
        open_clip.create_model("ov2-vit-nano-8", **paths)


def test_an_openvision_1_checkpoint_stays_openclips_and_gives_its_encoder_to_ours(tmp_path: Path, caplog) -> None:
    """Oracles: OpenCLIP without the plugin, by its own class; the file's tensors. The config is a released one's."""
    cfg = config("l")
    vision = {k: v for k, v in cfg["model_cfg"]["vision_cfg"].items() if k != "output_tokens"}
    text = {
        "context_length": 80, "vocab_size": 320, "width": 32, "heads": 2, "layers": 1, "pool_type": "last",
        "no_causal_mask": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6},
    }  # fmt: skip
    preprocess = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear",
                  "resize_mode": "squash"}  # fmt: skip
    model_cfg = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    stock = open_clip.CLIP(**model_cfg)
    stock.visual.load_state_dict(encoder_state("l", output_width=48))
    torch.save(stock.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert type(model) is open_clip.CLIP
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(images()), stock.eval().encode_image(images()))
    assert "Resize(size=(56, 56)" in str(transform)
    assert "mean=[0.485, 0.456, 0.406]" in str(transform)
    ours = {
        "embed_dim": 64,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 8, "vocab_size": 50, "bos_id": 1, "eos_id": 2},
        "decoder_cfg": {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32},
        "custom_text": True,
    }
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "open_clip_config.json").write_text(json.dumps({"model_cfg": ours}))
    mine = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}", load_weights=False)
    with caplog.at_level(logging.INFO):
        open_clip.load_checkpoint(mine, str(tmp_path / "open_clip_pytorch_model.bin"))
    visual = stock.visual.state_dict()
    taken = mine.state_dict()
    for key in visual.keys() - {"proj"}:  # the table becomes ours, which is the same but for the last digits
        tolerance = 1e-6 if key == "positional_embedding" else 0
        torch.testing.assert_close(taken[f"visual.{key}"], visual[key], atol=tolerance, rtol=0)
    assert "left out: " in caplog.text
    assert "visual.proj" in caplog.text


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def change_config(folder: Path, change) -> None:
    cfg = config("l")
    change(cfg)
    (folder / "open_clip_config.json").write_text(json.dumps(cfg))


def save(folder: Path, state) -> None:
    torch.save(state, folder / "open_clip_pytorch_model.bin")


BLOCK = "transformer.resblocks.2."
BROKEN = {
    "wrong shape": (
        lambda folder, state: save(folder, {**state, "proj": torch.zeros(64, 48)}),
        r"1 of another shape \(visual\.proj \(64, 48\), not \(64, 64\)\)",
    ),
    "missing key": (
        lambda folder, state: save(folder, {k: v for k, v in state.items() if k != f"{BLOCK}ln_1.weight"}),
        r"1 missing \(visual\.transformer\.resblocks\.2\.ln_1\.weight\)",
    ),
    "a block too many": (
        lambda folder, state: save(
            folder, {**state, **{k.replace(".2.", ".3."): v for k, v in state.items() if BLOCK in k}}
        ),
        r"12 unexpected \(visual\.transformer\.resblocks\.3\.attn.*and 6 more",
    ),
    "a table of no grid": (
        lambda folder, state: save(folder, {**state, "positional_embedding": torch.zeros(20, 64)}),
        r"visual\.positional_embedding \(20, 64\), not \(17, 64\)",
    ),
    "a table that is a number": (
        lambda folder, state: save(folder, {**state, "positional_embedding": torch.tensor(1.0)}),
        r"visual\.positional_embedding \(\), not \(17, 64\)",
    ),
    "pickle bomb": (
        lambda folder, state: save(folder, {**state, "proj": Bomb(folder / "ran")}),
        "cannot be read as a file of tensors only",
    ),
    "no tensors": (lambda folder, state: save(folder, {"proj": 1.0}), "not a state dict"),
    "no checkpoint at all": (
        lambda folder, state: (folder / "open_clip_pytorch_model.bin").write_bytes(b"version https://git-lfs"),
        "cannot be read as a file of tensors only",
    ),
    "unknown vision key": (
        lambda folder, state: change_config(folder, lambda cfg: cfg["model_cfg"]["vision_cfg"].update(hed_width=16)),
        "vision_cfg: unknown key 'hed_width'; did you mean head_width",
    ),
    "unknown model key": (
        lambda folder, state: change_config(folder, lambda cfg: cfg["model_cfg"].update(run_this="rm")),
        "model config: unknown key 'run_this'",
    ),
    "a tower of timm's": (
        lambda folder, state: change_config(
            folder, lambda cfg: cfg["model_cfg"].update(decoder_cfg=None) or cfg["model_cfg"]["vision_cfg"].update(
                timm_model_name="hf-hub:evil/model")),
        "vision_cfg: unknown key 'timm_model_name'",
    ),
    "no vision_cfg": (
        lambda folder, state: change_config(folder, lambda cfg: cfg["model_cfg"].pop("vision_cfg")),
        r"open_clip_config\.json: model_cfg has no vision_cfg",
    ),
    "vision_cfg is a list": (
        lambda folder, state: change_config(folder, lambda cfg: cfg["model_cfg"].update(vision_cfg=[1])),
        r"model_cfg\.vision_cfg is not a JSON object",
    ),
    "no model_cfg": (lambda folder, state: change_config(folder, dict.clear), "missing 'model_cfg'"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_wrong_with_a_folder_is_said(broken: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[broken]
    spoil(tmp_path, write_released(tmp_path, "l"))
    with pytest.raises(ValueError, match=message):
        open_clip.create_model(f"local-dir:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_config_cannot_switch_on_remote_code(tmp_path: Path) -> None:
    def spoil(cfg: dict) -> None:
        cfg["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}

    write_released(tmp_path, "l")
    change_config(tmp_path, spoil)
    with pytest.raises(ValueError, match="trust_remote_code, which is not allowed in a config"):
        open_clip.create_model(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match="trust_remote_code, which is not allowed in a config"):
        open_clip.get_tokenizer(f"local-dir:{tmp_path}")


def test_sizes_that_a_config_leaves_out_are_the_published_ones() -> None:
    """Oracle: reference.md, encoder variants: H has 16 heads, So400m an MLP of 4304, g one of 6144."""
    given_cfg = {"layers": 1, "patch_size": 14, "image_size": 28}
    for width, heads, mlp in ((1280, 16, 5120), (1152, 16, 4304), (1408, 16, 6144), (1024, 16, 4096)):
        cfg = complete_vision_cfg({**given_cfg, "width": width})
        assert width // cfg["head_width"] == heads
        assert int(width * cfg["mlp_ratio"]) == mlp
    with pytest.raises(ValueError, match="vision_cfg has no width"):
        complete_vision_cfg(given_cfg)


def test_features_of_any_layer(tmp_path: Path) -> None:
    """Oracle: the tokens after each block, computed plainly; the final norm by its equation."""
    state = write_released(tmp_path, "l")
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    after, _ = plain_encoder(state, 16, images())
    with torch.no_grad():
        for layer in (-3, -2, -1, 0, 1, 2):
            torch.testing.assert_close(model.features(images(), layer=layer), after[layer][:, 1:], **TIGHT)
            whole = model.features(images(), layer=layer, class_token=True)
            torch.testing.assert_close(whole, after[layer], **TIGHT)
        assert torch.equal(model.features(images()), model.encode_image_tokens(images()))
        normed = model.features(images(), layer=-2, norm=True, class_token=True)
        weight, bias = state["ln_post.weight"], state["ln_post.bias"]
        expected = torch.nn.functional.layer_norm(after[-2], (64,), weight, bias, eps=1e-6)
        torch.testing.assert_close(normed, expected, **TIGHT)
        stock = open_clip_ov2.image_features(open_clip.create_model("ViT-S-32-alt").visual, images(224), layer=-2)
        assert stock.shape == (2, 49, 384)
    with pytest.raises(ValueError, match="layer 3: this encoder has 3 blocks, 0 to 2, or -3 to -1"):
        model.features(images(), layer=3)

"""Each format loaded by its own library. Oracle: its forward pass against our model's, at two resolutions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from export_fixtures import images, make_run
from PIL import Image

from open_clip_ov2 import training
from open_clip_ov2.cli import main
from open_clip_ov2.core import VisionModel
from open_clip_ov2.formats.targets import TARGETS

SIZES = (56, 84)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def flags(size: int) -> list[str]:
    return [] if size == SIZES[0] else ["--image-size", str(size)]


@pytest.mark.parametrize("size", SIZES)
def test_transformers(run, size: int, tmp_path: Path) -> None:
    from transformers import AutoModel, ViTForImageClassification, ViTModel

    folder, ours = run.export("hf", tmp_path / "hf", *flags(size)), run.at(size)
    theirs, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is ViTModel
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]  # noqa: PT018
    with torch.no_grad():
        out = theirs.eval()(images(size), output_hidden_states=True)
        for layer in (-3, -2, -1):
            tokens = ours.features(images(size), layer=layer, class_token=True)
            torch.testing.assert_close(out.hidden_states[layer], tokens, **CLOSE)
        normed = ours.features(images(size), norm=True, class_token=True)
        torch.testing.assert_close(out.last_hidden_state, normed, **CLOSE)
        torch.testing.assert_close(out.pooler_output, normed[:, 0], **CLOSE)
    classifier = ViTForImageClassification.from_pretrained(folder, num_labels=3).eval()
    with torch.no_grad():
        hidden = classifier(images(size), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(hidden[:, 1:], ours.encode_image_tokens(images(size)), **CLOSE)


@pytest.mark.parametrize("shape", [(90, 70), (61, 133), (56, 56)])
def test_image_processor_of_transformers(run, shape: tuple[int, int], tmp_path: Path) -> None:
    """Oracle: our preprocessing. Its resize works on a tensor, ours on the picture: at most one grey level apart."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(run.export("hf", tmp_path / "hf"))
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run.folder}", load_weights=False)
    ours, theirs = preprocess(picture), processor(picture, return_tensors="pt").pixel_values[0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1.01 / 255 / 0.224


@pytest.mark.parametrize("size", SIZES)
def test_timm(run, size: int, tmp_path: Path) -> None:
    import timm

    folder, ours = run.export("timm", tmp_path / "timm", *flags(size)), run.at(size)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        tokens = theirs.forward_features(images(size))[:, 1:]
        torch.testing.assert_close(tokens, ours.encode_image_tokens(images(size)), **CLOSE)
        torch.testing.assert_close(theirs(images(size)), ours.encode_image(images(size)), **CLOSE)
        penultimate = theirs.forward_intermediates(images(size), indices=[1], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(penultimate[0], ours.features(images(size), layer=-2), **CLOSE)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (3, size, size)
    assert tuple(config["mean"]) == (0.485, 0.456, 0.406)
    assert config["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("width", "patch", "entry"),
    [(192, 16, "vit_tiny_patch16_224"), (1024, 14, "vit_large_patch14_224"), (1408, 14, "vit_giant_patch14_224")],
)
def test_timm_entries_of_the_published_sizes_agree(width: int, patch: int, entry: str) -> None:
    """Oracle: timm's own registry, on the meta device: nothing but pooling and head differs from its entry."""
    import timm

    name = {192: "ti-16", 1024: "l-14", 1408: "g-14"}[width]
    with torch.device("meta"):
        model = open_clip.create_model(f"ov2-vit-{name}", device="meta")
        theirs = timm.create_model(entry, num_classes=width, global_pool="avg")
    from open_clip_ov2.formats import Encoder, Preprocessing
    from open_clip_ov2.formats import timm as export

    block, mean = model.visual.transformer.resblocks[0], (0.0, 0.0, 0.0)
    encoder = Encoder(
        width, len(model.visual.transformer.resblocks), block.attn.num_heads, block.mlp.c_fc.out_features, patch,
        (224, 224), Preprocessing(mean, mean), model.visual.state_dict(),
    )  # fmt: skip
    assert export.config(encoder)["architecture"] == entry
    shapes = {key: value.shape for key, value in export.state_dict(encoder).items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert theirs.blocks[0].attn.num_heads == block.attn.num_heads


STOCK = """
import sys, torch, open_clip
folder, images_file, out_file = sys.argv[1:]
assert "open_clip_ov2" not in sys.modules
model, preprocess = open_clip.create_model_from_pretrained("local-dir:" + folder)
images = torch.load(images_file)
with torch.no_grad():
    out = model.eval().visual.forward_intermediates(images, indices=2, output_fmt="NLC")
    text = model.encode_text(open_clip.get_tokenizer("local-dir:" + folder)(["a"]))
    torch.save([model.encode_image(images), *out["image_intermediates"], text, str(preprocess)], out_file)
"""


def test_open_clip_without_the_plugin(run, tmp_path: Path) -> None:
    size = SIZES[1]
    folder, ours = run.export("open-clip", tmp_path / "stock", *flags(size)), run.at(size)
    torch.save(images(size), tmp_path / "in.pt")
    command = [sys.executable, "-c", STOCK, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    pooled, penultimate, last, text, preprocess = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        torch.testing.assert_close(pooled, ours.encode_image(images(size)), **CLOSE)
        torch.testing.assert_close(last, ours.encode_image_tokens(images(size)), **CLOSE)
        torch.testing.assert_close(penultimate, ours.features(images(size), layer=-2), **CLOSE)
    assert not text.any()
    assert "interpolation=bilinear" in preprocess
    assert "0.485" in preprocess


@pytest.mark.parametrize("size", SIZES)
def test_the_released_format_and_back(run, size: int, tmp_path: Path) -> None:
    """Oracle: the model itself; the files' names and keys as reference.md lists them."""
    folder, ours = run.export("released", tmp_path / "released", *flags(size)), run.at(size)
    names = {"open_clip_config.json", "open_clip_pytorch_model.bin", "caption_decoder.safetensors",
             "text_decoder_config.json", "bert_base_vocab_bos_eos.txt", "README.md"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    assert len(state) == 12 * 3 + 6
    assert not any(key.startswith("visual.") for key in state)
    back = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    assert isinstance(back, VisionModel)
    import open_clip_ov2

    captioner, _, _ = open_clip_ov2.create_caption_model(str(folder))
    with torch.no_grad():
        assert torch.equal(back.encode_image_tokens(images(size)), ours.encode_image_tokens(images(size)))
        assert torch.equal(back.encode_image(images(size)), ours.encode_image(images(size)))
        captions = ours.generate(images(size), keep_ratio=1.0, seq_len=8)
        assert torch.equal(captioner.generate(images(size), seq_len=8), captions)


def test_the_whole_model(run, tmp_path: Path) -> None:
    """Oracle: the model itself, its captions and its options."""
    folder = run.export("ov2", tmp_path / "whole")
    back, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    state, ours = back.state_dict(), run.model.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[key], ours[key]) for key in ours)
    assert (str(back.token_drop.keep_ratio), back.token_drop.eval_keep_ratio) == ("0.25:1", 1.0)
    assert back.text_config == run.model.text_config
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["word3"])[0, :3].tolist() == [1, 7, 2]


@pytest.fixture(scope="module")
def onnx_export(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An export with int8, and what `ov2 export` says of it."""
    return training.export(run.folder, "onnx", tmp_path_factory.mktemp("onnx") / "encoder", int8=True)


def close_in_onnx(run, size: int, folder: Path) -> None:
    """Oracle: our model on batches other than the one that was exported."""
    session, ours = onnxruntime.InferenceSession(str(folder / "encoder.onnx")), run.at(size)
    for batch in (1, 5):
        tokens, pooled = session.run(["tokens", "pooled"], {"images": images(size, batch).numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(tokens), ours.encode_image_tokens(images(size, batch)), atol=5e-5, rtol=1e-5
            )
            torch.testing.assert_close(torch.from_numpy(pooled), ours.encode_image(images(size, batch)), **CLOSE)


def test_onnx(run, onnx_export) -> None:
    """Oracle: onnxruntime; int8's error is the one that is reported."""
    folder, notes = onnx_export
    close_in_onnx(run, SIZES[0], folder)
    assert notes[0].startswith("encoder.onnx: largest difference to torch ")
    small = onnxruntime.InferenceSession(str(folder / "encoder_int8.onnx"))
    fixed = torch.randn(3, 3, SIZES[0], SIZES[0], generator=torch.Generator().manual_seed(0))
    tokens, _ = small.run(["tokens", "pooled"], {"images": fixed.numpy()})
    with torch.no_grad():
        error = (torch.from_numpy(tokens) - run.at(SIZES[0]).encode_image_tokens(fixed)).abs().max().item()
    assert notes[1].startswith(f"encoder_int8.onnx: largest difference to torch {error:.1e}")
    assert 1e-4 < error < 1.0
    weights = {
        name: sum(path.stat().st_size for path in folder.glob(f"{name}*"))
        for name in ("encoder.onnx", "encoder_int8.onnx")
    }
    assert weights["encoder_int8.onnx"] < 0.6 * weights["encoder.onnx"]


def test_onnx_at_another_resolution(run, tmp_path: Path, capsys) -> None:
    close_in_onnx(run, SIZES[1], run.export("onnx", tmp_path / "onnx", *flags(SIZES[1])))
    assert "encoder.onnx: largest difference to torch" in capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_the_cards_own_code_runs(run, target: str, language_model: Path, tmp_path: Path, monkeypatch, request) -> None:
    """Oracle: our patch tokens, under the name that the card gives them."""
    more = ["--language-model", str(language_model)] if target == "llava" else []
    if target == "onnx":
        folder = request.getfixturevalue("onnx_export")[0]
        monkeypatch.chdir(folder.parent)
    else:
        monkeypatch.chdir(tmp_path)
        folder = run.export(target, Path("encoder"), *more)
    card = (folder / "README.md").read_text()
    picture, pixels = Image.effect_noise((56, 56), 60).convert("RGB"), images()
    names = {"image": picture, "images": pixels}
    with torch.no_grad():
        exec(card.split("```python\n")[1].split("```")[0], names)
        if target == "llava":
            assert type(names["model"]).__name__ == "LlavaForConditionalGeneration"
            return
        _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run.folder}", load_weights=False)
        expected = run.model.encode_image_tokens(preprocess(picture)[None] if target == "hf" else pixels)
    torch.testing.assert_close(torch.as_tensor(names["tokens"]), expected, atol=5e-5, rtol=1e-5)


def test_a_released_encoder_is_exported_too(tmp_path: Path) -> None:
    """Oracle: the released encoder computed plainly; an interpolated or recomputed table as asked."""
    from released_files import plain_encoder, plain_table, write_released
    from transformers import AutoModel

    state = write_released(tmp_path / "released", "h")
    argv = ["export", str(tmp_path / "released"), "--to", "hf", "--image-size", "84", "--position-table", "recompute"]
    assert main(argv) == 0
    theirs = AutoModel.from_pretrained(tmp_path / "released" / "export" / "hf").eval()
    after, _ = plain_encoder({**state, "positional_embedding": plain_table(6, 160)}, 80, images(84))
    with torch.no_grad():
        hidden = theirs(images(84), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, after[-1], atol=3e-5, rtol=1e-5)


def test_patches_of_other_sizes(tmp_path: Path) -> None:
    """Oracle: timm's forward pass; the nearest entry is /14, the model is /8."""
    import timm

    run = make_run(tmp_path / "run", patch_size=8)
    theirs = timm.create_model(f"local-dir:{run.export('timm', tmp_path / 'timm')}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images(32)), run.model.encode_image(images(32)), **CLOSE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "llava"], "--to llava needs --language-model DIR"),
        (["--to", "hf", "--int8"], "--int8 is for --to onnx, and this is --to hf"),
        (["--to", "llava", "--language-model", "nowhere"], "--language-model nowhere: no such folder"),
        (["--to", "llava", "--language-model", ".", "--feature-layer", "-4"], "expected -3 (first block) to -1 (last)"),
        (["--to", "llava", "--language-model", ".", "--feature-layer", "0"], "expected -3 (first block) to -1 (last)"),
        (["--to", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--to", "hf", "--image-size", "60"], "image size 60 is not a multiple of the patch size 14"),
        (["--to", "hf", "--licence", ""], "--license '': expected one line"),
        (["--to", "timm", "--out", "full"], "exists and is not an empty folder"),
    ],
)
def test_slips_are_one_line_and_leave_nothing_behind(run, argv, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = [] if "--out" in argv else ["--out", "out"]
    assert main(["export", str(run.folder), *argv, *out]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_baselines_encoder_is_refused(baselines: Path, tmp_path: Path, capsys) -> None:
    model = open_clip.create_model(f"local-dir:{baselines / 'clip_tiny'}", load_weights=False)
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((baselines / "clip_tiny" / "open_clip_config.json").read_bytes())
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert main(["export", str(folder), "--to", "hf"]) == 2
    assert "CLIP is not an ov2 model" in capsys.readouterr().err

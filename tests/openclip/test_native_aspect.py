"""`ov2 train --aspect native` end to end on tars of wide and tall images. Oracles are named at each test."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_resume import as_if_killed_after
from training import TINY, TINY_MODEL, assert_equal_weights, results, weights

from open_clip_ov2 import UserError, open_model
from open_clip_ov2.argv import without
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core import IGNORE_INDEX, caption_targets, reference, sincos_2d
from open_clip_ov2.data.crop import RandomCrop, ToBudget, TokenBudget, as_batch
from open_clip_ov2.data.decode import EncodedImage
from open_clip_ov2.evaluate.caption_loss import kept_by_key
from open_clip_ov2.openclip.models.preprocess import eval_transform, train_crop
from open_clip_ov2.recipe.stage import parse_stage
from open_clip_ov2.train.checkpoint import list_checkpoints

SHAPES = [(64, 16), (16, 64), (40, 32), (24, 24), (90, 10)]
NATIVE = ["--aspect", "native", "--max-tokens", "9"]


def write_tars(folder: Path, shards: int, samples: int) -> None:
    """Images of one color, wide, tall and square, with captions that name the color."""
    folder.mkdir(parents=True)
    colors = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 220)}
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for index in range(samples):
                number, out = shard * samples + index, io.BytesIO()
                name = list(colors)[number % 3]
                Image.new("RGB", SHAPES[number % len(SHAPES)], colors[name]).save(out, "png")
                tar.write({"__key__": f"{number:06d}", "png": out.getvalue(), "txt": f"a {name} picture"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_tars(folder / "train", 4, 8)
    write_tars(folder / "val", 1, 7)
    return folder


def flags(data: Path, logs: Path, name: str, *more: str) -> list[str]:
    return [
        *TINY, "--train-data", f"{data}/train/{{00000..00003}}.tar", "--val-data", f"{data}/val/00000.tar",
        "--workers", "0", "--batch-size", "4", "--lr", "1e-3", "--warmup", "1", "--log-every-n-steps", "1",
        "--logs", str(logs), "--name", name, *more,
    ]  # fmt: skip


# --- sizes ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.integers(1, 3000), st.integers(1, 3000))
def test_the_grid_is_the_nearest_of_all(most: int, height: int, width: int) -> None:
    """Oracle: every grid within the budget. An image also gets at least half of it, and exactly it where that fits."""
    rows, columns = TokenBudget(most, 8).grid(height, width)
    ideal = math.sqrt(most * height / width), math.sqrt(most * width / height)

    def distance(grid: tuple[int, int]) -> float:
        return sum(math.log(side / wanted) ** 2 for side, wanted in zip(grid, ideal, strict=True))

    every = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    assert distance((rows, columns)) <= min(map(distance, every)) + 1e-12
    assert most / 2 <= rows * columns <= most
    side = math.isqrt(most)
    assert TokenBudget(side**2, 8).size(height, height) == (8 * side, 8 * side)


@settings(deadline=None, max_examples=20)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 5))
def test_a_training_crop_keeps_the_shape(height: int, width: int, seed: int) -> None:
    """Oracles: the budget; the ratio of sides, to what the drawn ratio and the grid allow; fast and exact decoding draw
    the same box."""
    cfg = {"size": 24, "interpolation": "bilinear"}
    budget, out = TokenBudget(36, 8), io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(out, "jpeg")
    shapes = []
    for fast in (True, False):
        crop = train_crop(cfg, {"scale": (0.4, 1.0), "ratio": (1.0, 1.0)}, fast, budget)
        assert isinstance(crop, RandomCrop)
        torch.manual_seed(seed)
        pixels = crop.decoded(EncodedImage(out.getvalue(), fast=fast))
        shapes.append(tuple(pixels.shape))
        assert (pixels.float().mean(dim=(1, 2)) - torch.tensor([200.0, 10.0, 10.0])).abs().max() < 8
    assert shapes[0] == shapes[1]
    rows, columns = shapes[0][1] // 8, shapes[0][2] // 8
    assert rows * columns <= 36
    box = torch.tensor([height, width]).float()
    if box.max() / box.min() < 6:
        assert abs(math.log((columns / rows) / (width / height))) < 0.5


def test_the_evaluation_transform_squeezes_and_cuts_nothing() -> None:
    """Oracle: PIL's resize of the whole image."""
    image = Image.effect_noise((200, 40), 80).convert("RGB")
    cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
    transform = eval_transform(cfg, TokenBudget(20, 8))
    assert isinstance(transform.transforms[0], ToBudget)
    found = transform(image)
    assert found.shape == (3, 16, 80)
    small = torch.frombuffer(bytearray(image.resize((80, 16), Image.Resampling.BILINEAR).tobytes()), dtype=torch.uint8)
    torch.testing.assert_close(found, small.view(16, 80, 3).permute(2, 0, 1) / 255)


# --- training, and everything after it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square stage, then a native one from its weights."""
    logs = tmp_path_factory.mktemp("logs")
    stages = ["--stage", "24:samples=16", "--stage", "tokens=9:samples=32"]
    words = flags(data, logs, "run", *stages, "--report-to", "tensorboard")
    assert ov2(["train", *without(words, ["--force-image-size"])]) == 0
    return logs / "run"


def test_stages_go_from_squares_to_any_shape(run: Path) -> None:
    """Oracle: the records of the run, and OpenCLIP's own loader for the folder."""
    import open_clip

    assert [row["samples_seen"] for row in results(run, "train")][-1] == 48
    config = json.loads((run / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["max_tokens"] == 9
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run}")
    square = preprocess(Image.new("RGB", (64, 16)))[None]
    assert model.encode_image(square).shape == (1, 32)  # the same weights are a model of squares


def test_validation_is_that_of_one_image_at_a_time(run: Path, data: Path) -> None:
    """Oracle: core/reference.py over the transform of each image, with the tokens that belong to its key."""
    opened = open_model(run)
    model, own = opened.model, opened.max_tokens
    transform = eval_transform(opened.preprocess_cfg, TokenBudget(own, 8))
    params = dict(model.state_dict())
    heads = model.visual.transformer.resblocks[0].attn.num_heads, model.text_decoder.config.heads
    total, count = 0.0, 0
    for sample in wds.WebDataset(f"{data}/val/00000.tar", shardshuffle=False).decode("pil"):
        image, ids = transform(sample["png"]), opened.tokenizer([sample["txt"]])
        grid = image.shape[1] // 8, image.shape[2] // 8
        kept = kept_by_key([sample["__key__"]], grid[0] * grid[1], int(grid[0] * grid[1] * 0.35))
        params["visual.positional_embedding"] = sincos_2d(grid, 32)
        kept_BKD = reference.encode(params, image[None], heads[0])[:, kept[0]]
        fusion = model.text_decoder.config.fusion
        logits = reference.decode(params, kept_BKD, ids[:, :-1], heads[1], fusion)[0]
        labels = caption_targets(ids, model.text_config.eos_id)[0]
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += int((labels != IGNORE_INDEX).sum())
    assert results(run, "val")[-1]["caption_loss"] == pytest.approx(total / count, abs=1e-5)


def test_eval_and_caption_are_native_by_themselves(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracles: the run's own validation; one image in a batch of its own; the batch size."""
    tar = f"{data}/val/00000.tar"
    found = []
    for batch, more in ((3, []), (7, ["--aspect", "square"]), (1, NATIVE)):
        words = ["--data", tar, "--tasks", "caption-loss,shuffled-loss,read-text", "--batch-size", str(batch)]
        assert ov2(["eval", str(run), *words, *more, "--out", str(tmp_path / f"{batch}.json")]) == 0
        found.append(json.loads((tmp_path / f"{batch}.json").read_text()))
    losses = [one["caption-loss"]["caption_loss"] for one in found]
    assert losses[0] == pytest.approx(results(run, "val")[-1]["caption_loss"], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-6
    assert found[0]["read-text"] == found[2]["read-text"]
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    words = ["--checkpoint", str(run), "--json", "--out", str(sheet), "--show-tokens"]
    assert ov2(["caption", tar, *words]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ov2(["caption", tar, "--checkpoint", str(run), "--json", "--limit", "1"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[0])
    assert [one["text"] for one in alone["captions"]] == [one["text"] for one in together[0]["captions"]]
    assert Image.open(sheet).width > 200


def test_probes_of_tokens_say_why_not(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", f"{data}/val/00000.tar", "--train-data", f"{data}/val/00000.tar", "--label-key", "txt"]
    assert ov2(["eval", str(run), *words, "--tasks", "knn"]) == 0
    assert ov2(["eval", str(run), *words, "--tasks", "attentive-probe"]) == 2
    assert "give --aspect square" in capsys.readouterr().err


def test_a_resumed_run_is_the_run(data: Path, tmp_path: Path) -> None:
    """Oracle: the run that was not interrupted, bit for bit."""
    words = flags(data, tmp_path / "one", "run", *NATIVE, "--train-num-samples", "32", "--epochs", "1")
    words += ["--workers", "2", "--report-to", "tensorboard", "--save-every-steps", "3", "--keep-checkpoints", "9"]
    assert ov2(["train", *words]) == 0
    whole = tmp_path / "one" / "run"
    first = list_checkpoints(whole / "checkpoints")[0]
    again = as_if_killed_after(whole, first, tmp_path / "two")
    assert ov2(["train", *words, "--logs", str(tmp_path / "two")]) == 0
    assert_equal_weights(*(weights(folder / "checkpoints" / "stage_1.pt") for folder in (whole, again)))


def test_an_elastic_run_is_the_same_on_other_workers(data: Path, tmp_path: Path) -> None:
    """Oracle: bit for bit the run without data workers."""
    for workers in ("2", "0"):
        words = flags(data, tmp_path, workers, *NATIVE, "--train-num-samples", "16", "--epochs", "1")
        assert ov2(["train", *words, "--elastic", "1x2", "--workers", workers]) == 0
    assert_equal_weights(*(weights(tmp_path / name / "checkpoints" / "stage_1.pt") for name in ("2", "0")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-tokens", "9"], "without --aspect native"),
        ([*NATIVE, "--lora-rank", "4"], "images of one shape"),
        ([*NATIVE, "--force-patch-dropout", "0.5"], "equally many patches"),
        ([*NATIVE, "--aug-cfg", "use_timm=True"], "timm's crop gives squares"),
        (["--aspect", "native", "--max-tokens", "4"], "a keep ratio of 0.35 keeps none"),
        (["--aspect", "wide"], "expected one of square, native"),
    ],
)
def test_slips_are_one_line(
    more: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ov2(["train", *flags(data, tmp_path, "run", "--train-num-samples", "8", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2


def test_other_models_and_stages_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, message in (("clip-of-ov2-vit-nano-8", "is for ov2 models"), ("ov1-of-ov2-vit-nano-8", "one shape")):
        words = flags(data, tmp_path, "run", "--train-num-samples", "8", *NATIVE)
        words[words.index(TINY_MODEL)] = model
        assert ov2(["train", *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="both given"):
        parse_stage("tokens=9:samples=8,resolution=24")
    stage = parse_stage("tokens=256:samples=2M,name=wide")
    assert (stage.tokens, stage.samples, stage.title) == (256, 2_000_000, "wide")
    assert stage.added_to([])[2:4] == ["--max-tokens", "256"]


def test_exports_hold_one_shape_and_say_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracles: the model's own tokens and pixels at that grid, in timm and transformers; the whole model still
    knows its budget."""
    import timm
    from transformers import AutoImageProcessor, AutoModel

    image, opened = Image.effect_noise((70, 30), 80).convert("RGB"), open_model(run)
    transform = eval_transform(opened.preprocess_cfg, TokenBudget(8, 8))
    pixels = transform(image)[None]
    assert pixels.shape[2:] == (16, 32)
    with torch.no_grad():
        expected = opened.model.encode_image_tokens(as_batch([pixels[0]], transform)).tokens_ID
        for target in ("timm", "hf"):
            out = tmp_path / target
            assert ov2(["export", str(run), "--to", target, "--out", str(out), "--image-size", "16", "32"]) == 0
            assert "images are squeezed to 16 x 32 px" in capsys.readouterr().out
        tokens = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval().forward_features(pixels)
        torch.testing.assert_close(tokens[0, 1:], expected, atol=2e-5, rtol=1e-5)
        theirs = AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(theirs, pixels, atol=0.03, rtol=0)  # one level of 256
        states = AutoModel.from_pretrained(tmp_path / "hf").eval()(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-1][0, 1:], expected, atol=2e-5, rtol=1e-5)
    assert ov2(["export", str(run), "--to", "ov2", "--out", str(tmp_path / "whole")]) == 0
    assert "squeezed" not in capsys.readouterr().out
    assert open_model(tmp_path / "whole").max_tokens == 9


def test_weights_go_back_to_squares(run: Path, data: Path, tmp_path: Path) -> None:
    """Oracle: the square stage of another run begins with these weights, bit for bit, at a learning rate of zero."""
    words = flags(data, tmp_path, "back", "--train-num-samples", "8", "--epochs", "1", "--lr", "0", "--wd", "0")
    words[words.index(TINY_MODEL)] = f"local-dir:{run}"
    assert ov2(["train", *words]) == 0
    assert_equal_weights(weights(tmp_path / "back" / "checkpoints" / "stage_1.pt"),
                         weights(run / "checkpoints" / "stage_2.pt"))  # fmt: skip

"""A checkpoint says what it is wherever it is opened. Oracle: the run's own model, and values of its flags."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from training import TINY_MODEL, data_flags

from open_clip_ov2 import UserError, open_model
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.openclip.command.flag_checks import check_pretrained
from open_clip_ov2.train.checkpoint import CONFIG_KEY

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
FLAGS = [
    "--fusion", "causal", "--keep-ratio", "0.5", "--image-mean", *map(str, MEAN), "--image-std", *map(str, STD),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory: pytest.TempPathFactory):
    """The model of the runs below as a name of OpenCLIP's registry, with its own fusion, ratio and vocabulary."""
    from open_clip import factory

    config = factory.get_model_config(TINY_MODEL)
    before = dict(factory._MODEL_CONFIGS)
    factory._MODEL_CONFIGS["ov2-tiny-8"] = config
    yield "ov2-tiny-8"
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(before)


@pytest.fixture(scope="module")
def run(tiny_name: str, squares: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages: 16 px, then 24."""
    place = tmp_path_factory.mktemp("logs")
    words = ["--tokenizer", str(vocabulary), "--force-context-length", "12"]
    stages = ["--stage", "16:samples=16", "--stage", "24:samples=16,keep-ratio=0.7"]
    base = data_flags(squares)
    for flag in ("--train-num-samples", "--epochs", "--val-data"):
        del base[base.index(flag) : base.index(flag) + 2]
    assert (
        ov2(["train", "--model", tiny_name, *base, *stages, *words, *FLAGS, "--logs", str(place), "--name", "run"]) == 0
    )
    return place / "run"


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def assert_is_stage(model, number: int) -> None:
    side, ratio = {1: (16, 0.5), 2: (24, 0.7)}[number]
    assert model.visual.image_size == (side, side)
    assert model.text_decoder.config.fusion == "causal"
    assert model.token_drop.keep_ratio.low == model.token_drop.eval_keep_ratio == ratio
    assert model.context_length == 12
    assert model.vocab_size < 49408
    assert tuple(model.visual.preprocess_cfg["mean"]) == MEAN
    assert tuple(model.visual.preprocess_cfg["std"]) == STD


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("where", ["in the run", "alone", "old"])
def test_by_name_it_is_what_it_was_trained_as(
    run: Path, tiny_name: str, tmp_path: Path, number: int, where: str, caplog
) -> None:
    """Also moved out of its run; and as older versions wrote it, without its configuration, which then is the last
    stage's beside it."""
    file = run / "checkpoints" / f"stage_{number}.pt"
    if where == "alone":
        file = Path(shutil.copy(file, tmp_path))
    if where == "old":
        shutil.copytree(run, tmp_path / "run")
        content = torch.load(file, weights_only=True)
        file = tmp_path / "run" / "checkpoints" / file.name
        torch.save({key: value for key, value in content.items() if key != "open_clip_config"}, file)
        number = 2
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_name, pretrained=str(file))
    assert_is_stage(model, number)
    assert f"mean={list(MEAN)}" in str(preprocess)
    (told,) = [record.getMessage() for record in caplog.records if "its own configuration" in record.getMessage()]
    assert "fusion causal (ov2-tiny-8: prefix)" in told
    assert "tokenizer word pieces (ov2-tiny-8: OpenCLIP's)" in told
    for source in (str(file), f"{tiny_name}:{file}"):
        opened = open_model(source)
        assert_is_stage(opened.model, number)
        assert opened.tokenizer(["a red square"])[0, 0] == 1
        assert opened.tokenizer.decode(opened.tokenizer(["a red square"])[0].tolist()) == "a red square"
        with torch.no_grad():
            images = pixels(model.visual.image_size[0])
            assert torch.equal(opened.model.encode_image_tokens(images), model.eval().encode_image_tokens(images))


def test_what_is_asked_for_otherwise_is_done_and_said(run: Path, tiny_name: str, caplog) -> None:
    options = {"force_image_size": 32, "keep_ratio": 1.0, "image_mean": (0.5, 0.5, 0.5)}
    model, _, preprocess = open_clip.create_model_and_transforms(
        tiny_name, pretrained=str(run / "checkpoints" / "stage_2.pt"), **options
    )
    assert model.visual.image_size == (32, 32)
    assert model.token_drop.keep_ratio.low == 1
    assert "mean=(0.5, 0.5, 0.5)" in str(preprocess)
    for part in ("image size 32 32 instead of the checkpoint's 24 24", "keep ratio 1 instead of the checkpoint's 0.7"):
        assert part in caplog.text
    assert "mean 0.5 0.5 0.5 instead of the checkpoint's 0.4 0.5 0.6" in caplog.text


def test_weights_into_a_model_that_exists_say_what_differs(run: Path, tiny_name: str, caplog) -> None:
    """Oracle: the model's own settings, which stay."""
    model = open_clip.create_model(tiny_name, text_cfg=open_model(run).model.text_config.__dict__)
    caplog.clear()
    open_clip.load_checkpoint(model, str(run / "checkpoints" / "stage_2.pt"))
    assert model.text_decoder.config.fusion == "prefix"
    assert "fusion prefix instead of the checkpoint's causal" in caplog.text
    assert "mean 0.485 0.456 0.406 instead of the checkpoint's 0.4 0.5 0.6" in caplog.text


def test_another_model_of_the_same_shapes_is_refused(run: Path, tiny_name: str, monkeypatch) -> None:
    """Four heads of 8 channels in place of two of 16 change no weight's shape."""
    from open_clip import factory

    config = factory.get_model_config(tiny_name)
    config["vision_cfg"]["head_width"] = 8
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ov2-heads-8", config)
    file = run / "checkpoints" / "stage_2.pt"
    with pytest.raises(UserError, match=r"not the model ov2-heads-8: encoder head_width 16, not 8"):
        open_clip.create_model("ov2-heads-8", pretrained=str(file))
    with pytest.raises(UserError, match="encoder head_width 16, not 8"):
        open_model(f"ov2-heads-8:{file}")


def test_a_runs_folder_is_its_newest_weights(run: Path, tmp_path: Path) -> None:
    """In OpenCLIP's own functions. Oracle: the file of the last stage."""
    newest = torch.load(run / "checkpoints" / "stage_2.pt", weights_only=True)["state_dict"]
    for model in (
        open_clip.create_model(f"local-dir:{run}"),
        open_clip.create_model_from_pretrained(f"local-dir:{run}", return_transform=False),
    ):
        assert_is_stage(model, 2)
        assert all(torch.equal(value, newest[name]) for name, value in model.state_dict().items())
    shutil.copytree(run, tmp_path / "begun")
    (tmp_path / "begun" / "checkpoints" / "stage_2.pt").unlink()
    assert_is_stage(open_clip.create_model(f"local-dir:{tmp_path / 'begun'}"), 1)
    (tmp_path / "begun" / "checkpoints" / "stage_1.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* yet"):
        open_clip.create_model(f"local-dir:{tmp_path / 'begun'}")
    assert_is_stage(open_clip.create_model(f"local-dir:{tmp_path / 'begun'}", load_weights=False), 2)


def train(squares: Path, logs: Path, *flags: str) -> int:
    return ov2(
        ["train", *data_flags(squares, 8), "--lr", "0", "--wd", "0", "--logs", str(logs), "--name", "new", *flags]
    )


def test_training_goes_on_as_the_flags_say_or_not_at_all(
    run: Path, tiny_name: str, squares: Path, vocabulary: Path, tmp_path: Path, capsys, caplog
) -> None:
    """At learning rate 0 the weights that come out are those that went in."""
    file = run / "checkpoints" / "stage_1.pt"
    before = torch.load(file, weights_only=True)["state_dict"]
    by_name = ["--model", tiny_name, "--pretrained", str(file), "--force-context-length", "12"]
    assert train(squares, tmp_path, *by_name) == 2
    error = capsys.readouterr().err
    for words in ("--fusion causal", "--image-mean 0.4 0.5 0.6", "--image-std 0.2 0.3 0.25", f"--tokenizer {run}"):
        assert words in error
    assert not (tmp_path / "new").exists()
    stated = ["--tokenizer", str(vocabulary), *FLAGS[:2], *FLAGS[4:]]
    assert train(squares, tmp_path, *by_name, *stated, "--keep-ratio", "0.9") == 0
    log = (tmp_path / "new" / "out.log").read_text()
    assert "keep ratio 0.9 instead of the checkpoint's 0.5" in log
    assert "image size 24 24 instead of the checkpoint's 16 16" in log
    model = open_model(tmp_path / "new").model
    assert model.token_drop.keep_ratio.low == 0.9
    assert model.text_decoder.config.fusion == "causal"
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "positional" not in name)


def test_what_must_be_stated(run: Path, tiny_name: str, vocabulary: Path, tmp_path: Path) -> None:
    """--augmentation family states mean, std and interpolation, and no resize mode; every digit is shown; a run's
    folder by its own name states all. Oracle: the values that are written here."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "stage_1.pt").unlink()
    file = tmp_path / "run" / "checkpoints" / "stage_2.pt"
    content = torch.load(file, weights_only=True)
    content[CONFIG_KEY]["preprocess_cfg"] |= {"resize_mode": "longest", "mean": [0.48145466, 0.4578275, 0.40821073]}
    torch.save(content, file)
    named = argparse.Namespace(model=tiny_name, pretrained=str(file), resume=None, cache_dir=None)
    fusion = ["--fusion", "causal", "--tokenizer", str(vocabulary)]
    with pytest.raises(UserError, match=r"was trained with --image-resize-mode longest, which differs from --model"):
        check_pretrained([*fusion, "--augmentation", "family"], None, named)
    with pytest.raises(UserError, match=r"--image-mean 0\.48145466 0\.4578275 0\.40821073 --image-std"):
        check_pretrained(fusion, None, named)
    check_pretrained(
        [],
        None,
        argparse.Namespace(model=f"local-dir:{tmp_path / 'run'}", pretrained=None, resume=None, cache_dir=None),
    )


def test_training_from_a_runs_folder_takes_all_of_it(run: Path, squares: Path, tmp_path: Path, capsys) -> None:
    """Oracle: weights, vocabulary and preprocessing of that run, at learning rate 0."""
    assert train(squares, tmp_path, "--model", f"local-dir:{run}") == 0
    model = open_model(tmp_path / "new").model
    assert_is_stage(model, 2)
    newest = torch.load(run / "checkpoints" / "stage_2.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, newest[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "new" / "vocab.txt").read_text() == (run / "vocab.txt").read_text()
    shutil.copytree(run, tmp_path / "empty", ignore=shutil.ignore_patterns("*.pt"))
    assert train(squares, tmp_path / "other", "--model", f"local-dir:{tmp_path / 'empty'}") == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(lambda whole: whole[: len(whole) // 2], "it ends too early"), (lambda whole: b"", "it is empty"),
     (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "not a file that torch.save wrote")],
    ids=["truncated", "empty", "text"],
)  # fmt: skip
def test_a_torn_checkpoint_is_one_line(run: Path, squares: Path, tmp_path: Path, content, message: str, capsys) -> None:
    torn = tmp_path / "run"
    shutil.copytree(run, torn)
    file = torn / "checkpoints" / "stage_2.pt"
    file.write_bytes(content(file.read_bytes()))
    (tmp_path / "red.png").touch()
    for command in (
        ["eval", str(torn), "--data", f"{squares}/val/00000.tar", "--tasks", "caption-loss"],
        ["export", str(file), "--to", "ov2", "--out", str(tmp_path / "out")],
        ["caption", str(tmp_path / "red.png"), "--checkpoint", str(torn)],
    ):
        assert ov2(command) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert error.startswith(f"ov2: error: {file}: ")
        assert message in error


def test_checkpoints_of_clip_carry_theirs_too(baselines: Path, squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: the constants of ov2 models, which --augmentation family gives it."""
    words = ["--tokenizer", str(vocabulary), "--augmentation", "family", "--force-context-length", "12"]
    name = f"local-dir:{baselines / 'clip_tiny'}"
    assert train(squares, tmp_path, "--model", name, *words) == 0
    file = tmp_path / "new" / "checkpoints" / "stage_1.pt"
    for opened in (open_model(file), open_model(tmp_path / "new")):
        assert tuple(opened.preprocess_cfg["mean"]) == (0.485, 0.456, 0.406)
        assert opened.tokenizer(["a red square"]).shape == (1, 12)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(file))
    assert "mean=[0.485, 0.456, 0.406]" in str(preprocess)
    assert model.token_embedding.num_embeddings < 49408

"""Weights that the package holds, from a folder as `ov2 export --to ov2` writes it. Oracle: the exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from export_fixtures import Run, images, make_run
from huggingface_hub import constants
from open_clip import factory
from PIL import Image
from safetensors.torch import load_file, save_file

import open_clip_ov2
from open_clip_ov2.cli import main
from open_clip_ov2.openclip.models import shipped

NAME, TAG = "ov2-tiny-14", "words"
TEXT = "word3 word7"


@dataclass(frozen=True)
class Package:
    run: Run
    folder: Path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """NAME's sizes with another fusion than NAME's, mean 0.5 and word pieces, in float16."""
    run = make_run(tmp_path / "run", mean=0.5)
    config = json.loads((run.folder / "open_clip_config.json").read_text())["model_cfg"]
    text = {"context_length": 12, "vocab_size": 49408, "bos_id": 49406, "eos_id": 49407}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{NAME}.json").write_text(json.dumps({**config, "text_cfg": text, "fusion": "causal"}))
    open_clip.add_model_config(tmp_path / "models")
    folder = run.export("ov2", tmp_path / "pretrained" / TAG)
    tensors = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    save_file({name: value.half() for name, value in tensors.items()}, folder / shipped.WEIGHTS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    monkeypatch.setattr(shipped, "SHIPPED", ((NAME, TAG), (NAME, "not_there")))
    open_clip_ov2.unregister()
    open_clip_ov2.register()
    return Package(run, folder)


@pytest.fixture(autouse=True)
def _registered_again(tmp_path: Path) -> Iterator[None]:
    """After the tables are put back."""
    yield
    factory._MODEL_CONFIG_PATHS[:] = [path for path in factory._MODEL_CONFIG_PATHS if path != tmp_path / "models"]
    factory._MODEL_CONFIGS.pop(NAME, None)
    open_clip_ov2.unregister()
    open_clip_ov2.register()


def assert_is_the_run(model: torch.nn.Module, run: Run) -> None:
    """Float16 has 11 bits, so weights differ by 2^-11 of their size at most."""
    theirs = run.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=2**-11)
    assert model.text_decoder.config == run.model.text_decoder.config
    assert model.visual.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    with torch.no_grad():
        ours, expected = (one.eval().encode_image_tokens(images()) for one in (model, run.model))
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=5e-3)


def test_it_is_a_pretrained_tag_with_the_config_of_its_folder(package: Package, caplog) -> None:
    assert (NAME, TAG) in open_clip.list_pretrained()
    assert "not_there" not in open_clip.list_pretrained_tags_by_model(NAME)
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=TAG)
    assert_is_the_run(model, package.run)
    assert "mean=[0.5, 0.5, 0.5]" in str(preprocess)
    (told,) = [record.getMessage() for record in caplog.records if "its own configuration is used" in record.message]
    for part in (f"fusion prefix ({NAME}: causal)", f"tokenizer word pieces ({NAME}: OpenCLIP's)", "mean 0.5 0.5 0.5"):
        assert part in told
    path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(NAME, TAG))
    assert Path(path) == package.folder / shipped.WEIGHTS
    open_clip_ov2.unregister()
    assert (NAME, TAG) not in open_clip.list_pretrained()


def test_its_name_and_tag_are_a_model_wherever_one_is_named(package: Package, tmp_path: Path, capsys) -> None:
    name = f"{NAME}:{TAG}"
    assert_is_the_run(open_clip.create_model(name), package.run)
    expected = open_clip.get_tokenizer(f"local-dir:{package.run.folder}")([TEXT])
    assert torch.equal(open_clip.get_tokenizer(name)([TEXT]), expected)
    opened = open_clip_ov2.open_model(name)
    assert_is_the_run(opened.model, package.run)
    assert torch.equal(opened.tokenizer([TEXT]), expected)
    assert opened.checkpoint == package.folder
    Image.effect_noise((70, 60), 80).convert("RGB").save(tmp_path / "noise.png")
    assert main(["caption", str(tmp_path / "noise.png"), "--checkpoint", name, "--device", "cpu"]) == 0
    assert "word" in capsys.readouterr().out.split("\t")[1]
    assert main(["export", name, "--to", "ov2", "--out", str(tmp_path / "again")]) == 0
    assert_is_the_run(open_clip.create_model(f"local-dir:{tmp_path / 'again'}"), package.run)
    assert main(["export", name, "--to", "ov2"]) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_the_package_contains_its_weights() -> None:
    """Oracle: setuptools' own globs, over files in the folder where weights are put."""
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["open_clip_ov2"]
    for _, tag in shipped.SHIPPED:
        for name in (shipped.WEIGHTS, "open_clip_config.json", "vocab.txt"):
            assert (shipped.FOLDER / tag / name).is_file()
            path = (shipped.FOLDER / tag / name).relative_to(root / "src" / "open_clip_ov2")
            assert any(path.match(pattern) for pattern in data)

"""Exports of an encoder for images that are wider than high. Oracle: the run's own model, in the other library."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from export_fixtures import Run, make_language_model, make_run

from open_clip_ov2.cli import main

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
SIDES = (28, 56)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("wide") / "run", sides=list(SIDES))


def images() -> torch.Tensor:
    return torch.randn(2, 3, *SIDES, generator=torch.Generator().manual_seed(0))


def test_timm(wide: Run, tmp_path: Path) -> None:
    import timm

    theirs = timm.create_model(f"local-dir:{wide.export('timm', tmp_path / 'timm')}", pretrained=True).eval()
    with torch.no_grad():
        tokens = theirs.forward_features(images())[:, 1:]
        torch.testing.assert_close(tokens, wide.model.encode_image_tokens(images()), **CLOSE)
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, *SIDES)


@pytest.mark.parametrize("target", ["open-clip", "ov2", "released"])
def test_open_clip(wide: Run, target: str, tmp_path: Path) -> None:
    model = open_clip.create_model(f"local-dir:{wide.export(target, tmp_path / target)}", require_pretrained=True)
    assert tuple(model.visual.image_size) == SIDES
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode_image(images()), wide.model.encode_image(images()), **CLOSE)


def test_onnx(wide: Run, tmp_path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(wide.export("onnx", tmp_path / "onnx") / "encoder.onnx"))
    (tokens,) = session.run(["tokens"], {"images": images().numpy()})
    with torch.no_grad():
        expected = wide.model.encode_image_tokens(images())
    torch.testing.assert_close(torch.from_numpy(tokens), expected, atol=1e-4, rtol=1e-4)


def test_what_transformers_cannot_prepare_is_refused_with_the_reason(wide: Run, tmp_path: Path, capsys) -> None:
    make_language_model(tmp_path / "words")
    for target, more in (("hf", []), ("llava", ["--language-model", str(tmp_path / "words")])):
        out = tmp_path / target
        assert main(["export", str(wide.folder), "--to", target, "--out", str(out), *more]) == 2
        error = capsys.readouterr().err
        assert "images of 28 x 56" in error
        assert "--to timm, onnx, open-clip or ov2 can" in error
        assert not out.exists()

"""`ov2 caption`: what cannot be used, JSON lines, several captions, draws of kept tokens, the sheet, the default model.

Oracle of captions and their log-likelihoods: the model's plain forward pass.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from export_fixtures import Run, make_run
from PIL import Image
from torch import Tensor

import open_clip_ov2
from open_clip_ov2.cli import main
from open_clip_ov2.core.loss import caption_targets
from open_clip_ov2.evaluate import pictures as pictures_module
from open_clip_ov2.evaluate.caption_loss import kept_by_key
from open_clip_ov2.evaluate.pictures import Picture
from open_clip_ov2.openclip.models import shipped
from open_clip_ov2.openclip.models.open_model import LoadedModel, open_model
from open_clip_ov2.tracking.sheet import CELL_PX, FAINT, GRAY, MARGIN_PX, dropped_gray

HALF = 8  # of 16 patches
WEIGHTS = "open_clip_pytorch_model.bin"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("logs") / "run")


@pytest.fixture(scope="module")
def opened(run: Run) -> LoadedModel:
    return open_model(run.folder)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, and two of them in a tar."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    with tarfile.open(folder / "two.tar", "w") as tar:
        for name in "abc":
            file = folder / f"{name}.png"
            Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
            if name != "c":
                tar.add(file, file.name)
    return folder


def captioned(run: Run | None, capsys: pytest.CaptureFixture[str], *argv: str | Path, status: int = 0) -> list[str]:
    """Lines of standard output."""
    model = ["--checkpoint", str(run.folder)] if run else []
    assert main(["caption", *map(str, argv), *model, "--device", "cpu"]) == status
    return capsys.readouterr().out.splitlines()


def log_likelihood(opened: LoadedModel, file: Path, text: str, kept_idx: Tensor | None = None) -> float:
    """Of the caption and its end, from the logits of a plain forward pass."""
    ids, images = opened.tokenizer([text]), opened.preprocess(Image.open(file))[None]
    with torch.no_grad():
        logits = opened.model(images, ids, kept_idx=kept_idx)["logits"]
    labels = caption_targets(ids, opened.model.text_config.eos_id)
    return -float(torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum"))


def test_what_cannot_be_used_is_named_and_counted_and_the_rest_is_written(
    run: Run, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no image, none at all, too many pixels, too many once resized, values without a range."""
    good = {"b.png": noise / "a.png", "g.png": noise / "b.png"}
    for name, file in good.items():
        (tmp_path / name).write_bytes(file.read_bytes())
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "c.png").touch()
    Image.new("1", (10_000, 9_000)).save(tmp_path / "d.png")
    Image.new("RGB", (30_000, 1)).save(tmp_path / "e.png")
    Image.new("F", (20, 20)).save(tmp_path / "f.tiff")
    sheet = tmp_path / "sheet.png"
    (tmp_path / "h.png").symlink_to("nowhere.png")
    assert main(["caption", str(tmp_path), "--checkpoint", str(run.folder), "--out", str(sheet)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    expected = captioned(run, capsys, *good.values())
    assert [line.split("\t")[1] for line in lines[:2]] == [line.split("\t")[1] for line in expected]
    assert [Path(line.split("\t")[0]).name for line in lines[:2]] == list(good)
    assert lines[2:] == [f"contact sheet: {sheet}"]
    assert Image.open(sheet).width == MARGIN_PX + 2 * (CELL_PX + MARGIN_PX)
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith("ov2: error: 2 images were captioned and 6 left out, named above (3 undecodable image, ")
    for name in ("a.png", "c.png", "d.png", "e.png", "f.tiff", "h.png"):
        assert any(name in record.getMessage() for record in caplog.records), name


def test_captions_come_before_the_next_images_are_read(run: Run, noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "BATCH_SIZE", 1)
    read: list[str] = []

    def images() -> Iterator[Picture]:
        for name in "abc":
            read.append(name)
            yield Picture(name, Image.open(noise / f"{name}.png"))

    captions = open_clip_ov2.caption(run.folder, images(), device="cpu")
    assert next(captions)[0].name == "a"
    assert read == ["a"]


def test_json_lines_have_the_log_likelihood(
    run: Run, opened: LoadedModel, noise: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one greedy caption; of beams, likeliest first; of samples. All images keep all tokens here."""
    plain = captioned(run, capsys, noise)
    for flags in ([], ["--num-captions", "3", "--generation-type", "beam_search", "--seq-len", "5"],
                  ["--num-captions", "4", "--generation-type", "top_k", "--seq-len", "4"]):  # fmt: skip
        rows = [json.loads(line) for line in captioned(run, capsys, noise, "--json", *flags)]
        assert [row["image"] for row in rows] == [line.split("\t")[0] for line in plain]
        for row in rows:
            assert row["references"] == []
            found = [one["log_likelihood"] for one in row["captions"]]
            assert found == sorted(found, reverse=True)
            assert len({one["text"] for one in row["captions"]}) == len(found) == max(1, len(found))
            expected = [log_likelihood(opened, Path(row["image"]), one["text"]) for one in row["captions"]]
            assert found == pytest.approx(expected, abs=1e-4)
        if not flags:
            assert [row["captions"][0]["text"] for row in rows] == [line.split("\t")[1] for line in plain]
        elif "beam_search" in flags:
            assert all(len(row["captions"]) == 3 for row in rows)
    lines = captioned(run, capsys, noise / "a.png", *flags)
    assert len(lines) > 1
    assert all(len(line.split("\t")) == 3 for line in lines)


def test_draws_do_not_depend_on_the_name(
    run: Run, opened: LoadedModel, noise: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same captions from files and from a tar, and the best is the best by the formula, written out."""
    flags = ["--json", "--keep-ratio", "0.5", "--draws", "3", "--num-captions", "3"]
    files = [json.loads(line) for line in captioned(run, capsys, noise / "a.png", noise / "b.png", *flags)]
    tars = [json.loads(line) for line in captioned(run, capsys, noise / "two.tar", *flags)]
    assert [row["captions"] for row in files] == [row["captions"] for row in tars]
    draws = [kept_by_key([f"draw {n}"], 16, HALF) for n in (1, 2, 3)]
    for row, name in zip(files, ("a.png", "b.png"), strict=True):
        images = opened.preprocess(Image.open(noise / name))[None]
        candidates = {
            opened.tokenizer.decode([id for id in opened.model.generate(images, kept_idx=kept)[0].tolist() if id > 2])
            for kept in draws
        }
        means = {
            text: np.mean([log_likelihood(opened, noise / name, text, kept) for kept in draws]) for text in candidates
        }
        assert [one["text"] for one in row["captions"]] == sorted(candidates, key=lambda text: -means[text])
        assert [one["log_likelihood"] for one in row["captions"]] == pytest.approx(
            sorted(means.values())[::-1], abs=1e-4
        )


def test_the_sheet_shows_what_the_decoder_sees(run: Run, opened: LoadedModel, noise: Path, tmp_path: Path) -> None:
    """Oracle: the tokens that belong to the key; the transform's own pixels."""
    ((picture, _),) = open_clip_ov2.caption(
        run.folder, [noise / "a.png"], device="cpu", keep_ratio=0.5, show_tokens=True
    )
    assert picture.seen is not None
    kept = np.zeros(16)
    kept[kept_by_key([str(noise / "a.png")], 16, HALF)[0].numpy()] = 1
    assert np.array_equal(picture.seen.kept, kept.reshape(4, 4))
    resize, crop = opened.preprocess.transforms[:2]
    seen = np.asarray(crop(resize(Image.open(noise / "a.png").convert("RGB")))).astype(int)
    assert np.abs(picture.seen.pixels.astype(int) - seen).max() <= 1
    shown = np.asarray(dropped_gray(picture.seen.pixels, picture.seen.kept)).astype(float)
    here = np.kron(kept.reshape(4, 4), np.ones((14, 14))).astype(bool)
    assert np.array_equal(shown[here], picture.seen.pixels[here])
    faint = FAINT * picture.seen.pixels[~here] + (1 - FAINT) * np.array(GRAY)
    assert np.abs(shown[~here] - faint).max() <= 0.51
    sheet = tmp_path / "sheet.png"
    argv = ["caption", str(noise / "a.png"), "--checkpoint", str(run.folder), "--keep-ratio", "0.0625", "--show-tokens"]
    assert main([*argv, "--out", str(sheet), "--draws", "2"]) == 0
    cell = np.asarray(Image.open(sheet))[MARGIN_PX : MARGIN_PX + CELL_PX, MARGIN_PX : MARGIN_PX + CELL_PX]
    assert (np.abs(cell.astype(int) - GRAY).max(axis=-1) < 30).mean() > 0.7  # at least 14 of 16 patches are dropped


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--show-tokens"], "add --out SHEET.png"),
        (["--num-captions", "2"], "greedy finds one caption of an image"),
        (["--num-captions", "9", "--generation-type", "beam_search"], "at most num_beams"),
        (["--draws", "0"], "draws: 0: expected an integer >= 1"),
    ],
)
def test_flags_that_do_not_fit(
    run: Run, noise: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(noise), "--checkpoint", str(run.folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_a_model_cannot_do_is_one_line(
    run: Run, baselines: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoder does not caption, and CoCa drops no tokens."""
    encoder = run.export("open-clip", tmp_path / "encoder")
    assert main(["caption", str(noise / "a.png"), "--checkpoint", str(encoder)]) == 2
    assert "cannot caption" in capsys.readouterr().err
    coca = tmp_path / "coca"
    shutil.copytree(baselines / "coca_tiny", coca)
    torch.save(open_clip.create_model(f"local-dir:{coca}", load_weights=False).state_dict(), coca / WEIGHTS)
    for flags in (["--draws", "2"], ["--show-tokens", "--out", str(tmp_path / "sheet.png")]):
        assert main(["caption", str(noise / "a.png"), "--checkpoint", str(coca), *flags]) == 2
        assert "cannot drop tokens" in capsys.readouterr().err


def test_without_a_checkpoint_the_packages_model_captions(
    run: Run, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run that the weights in the package are exported from. Without them, one line."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    assert main(["caption", str(noise / "a.png")]) == 2
    assert "ov2-vit-nano-8:rendered" in capsys.readouterr().err
    folder = run.export("ov2", tmp_path / "rendered")
    (folder / "open_clip_model.safetensors").rename(folder / shipped.WEIGHTS)
    capsys.readouterr()
    try:
        open_clip_ov2.unregister()
        open_clip_ov2.register()
        assert captioned(None, capsys, noise / "a.png") == captioned(run, capsys, noise / "a.png")
    finally:
        monkeypatch.undo()
        open_clip_ov2.unregister()
        open_clip_ov2.register()

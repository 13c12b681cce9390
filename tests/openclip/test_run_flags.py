"""Flags of OpenCLIP that say what becomes of a run: its checkpoints, copies, where it begins, zero-shot accuracy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import open_clip
import open_clip_train
import open_clip_train.main as open_clip_main
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.imagenet_info import ImageNetInfo
from torch.nn.functional import cross_entropy
from training import (
    TINY,
    assert_equal_weights,
    data_flags,
    figures,
    results,
    samples_of,
    weights,
)

import open_clip_ov2
from open_clip_ov2 import open_model
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core.loss import IGNORE_INDEX, caption_targets
from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.openclip.models.tokenizer import caching
from open_clip_ov2.train.checkpoint import RESUME_KEY, list_checkpoints


def run_flags(squares: Path, vocabulary: Path, logs: Path, name: str = "run") -> list[str]:
    """Epochs of two steps, without validations."""
    flags = [*TINY, *data_flags(squares, samples=16), "--force-image-size", "16", "--tokenizer", str(vocabulary)]
    return [*flags, "--val-frequency", "0", "--log-every-n-steps", "1", "--logs", str(logs), "--name", name]


def checkpoints(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def test_save_most_recent_and_delete_previous_checkpoint(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: the rule. A file after each epoch, whatever --save-frequency says; OpenCLIP's name leads to the last."""
    flags = [*run_flags(squares, vocabulary, tmp_path), "--epochs", "3", "--save-frequency", "0"]
    assert ov2(["train", *flags, "--save-most-recent"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints(tmp_path / "run") == ["stage_1_samples_16.pt", "stage_1_samples_32.pt", "stage_1.pt"]
    assert (folder / "epoch_latest.pt").resolve() == (folder / "stage_1.pt").resolve()
    assert torch.load(folder / "epoch_latest.pt", weights_only=True)["epoch"] == 3
    for path in (folder / "stage_1.pt", folder / "stage_1_samples_32.pt"):
        path.unlink()
    assert ov2(["train", *flags, "--save-most-recent", "--delete-previous-checkpoint"]) == 0
    assert checkpoints(tmp_path / "run") == ["stage_1.pt"]


def test_copy_codebase(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: the files of the packages that are imported here. A copy that is there already stays as it is."""
    flags = [*run_flags(squares, vocabulary, tmp_path), "--copy-codebase"]
    assert ov2(["train", *flags]) == 0
    code = tmp_path / "run" / "code"
    for package in (open_clip_ov2, open_clip, open_clip_train):
        source = Path(str(package.__file__)).parent
        names = {path.relative_to(source) for path in source.rglob("*.py")}
        assert {path.relative_to(code / source.name) for path in (code / source.name).rglob("*.py")} == names
        assert all((code / source.name / name).read_bytes() == (source / name).read_bytes() for name in names)
    (code / "open_clip" / "note").touch()
    assert ov2(["train", *flags]) == 0
    assert (code / "open_clip" / "note").exists()


SAVING = ["--epochs", "2", "--save-every-steps", "1", "--keep-checkpoints", "99"]


def test_resume_from_a_file_is_the_run_from_there_on(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of its own, and in the run's own folder, where later checkpoints are moved aside and later records
    dropped. Oracle: the run that was not interrupted, bit for bit. The same command, repeated, goes on from the newest.
    """
    flags = [*run_flags(squares, vocabulary, tmp_path), *SAVING]
    assert ov2(["train", *flags]) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    whole, last = figures(run), weights(run / "checkpoints" / "stage_1.pt")
    file = run / "checkpoints" / "stage_1_samples_16.pt"
    assert ov2(["train", *flags, "--name", "other", "--resume", str(file)]) == 0
    assert figures(other) == [record for record in whole if record["samples_seen"] > 16]
    assert_equal_weights(weights(other / "checkpoints" / "stage_1.pt"), last)
    back = ["train", *flags, "--resume", str(file)]
    assert ov2(back) == 0
    assert figures(run) == whole
    assert_equal_weights(weights(run / "checkpoints" / "stage_1.pt"), last)
    (aside,) = (run / "checkpoints").glob("replaced-*")
    assert [path.name for path in list_checkpoints(aside)] == ["stage_1_samples_24.pt", "stage_1.pt"]
    (run / "checkpoints" / "stage_1.pt").unlink()
    assert ov2(back) == 0
    assert f"resuming from {run}/checkpoints/stage_1_samples_24.pt" in (run / "out.log").read_text()
    assert figures(run) == whole
    assert_equal_weights(weights(run / "checkpoints" / "stage_1.pt"), last)
    assert len(list((run / "checkpoints").glob("replaced-*"))) == 1

    capsys.readouterr()
    bare = tmp_path / "bare.pt"
    torch.save(last, bare)
    for wrong, why in (
        ([str(file), "--wd", "0.5"], "with another configuration (wd: 0.2 before, 0.5 now)"),
        ([str(bare)], "has no epoch; --pretrained"),
        ([str(run / "run.json")], "run.json: not a checkpoint; expected one such as RUN/checkpoints/stage_1.pt"),
        ([str(run)], "a folder; if it is a sharded checkpoint, make a file of it: ov2 convert"),
        (["nowhere.pt"], "no such file; expected one such as RUN/checkpoints/stage_1.pt"),
    ):
        assert ov2(["train", *flags, "--name", "new", "--resume", *wrong]) == 2
        assert why in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "new" / "run.json").exists()


def test_resume_from_open_clips_own_checkpoint_is_open_clips_run(
    baselines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CoCa on samples that are all equal, in float32 on the CPU. Oracle: OpenCLIP's own `main` over both epochs."""
    name = f"local-dir:{baselines / 'coca_tiny'}"
    model = open_clip.create_model(name)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # which OpenCLIP leaves uninitialized
    torch.save(model.state_dict(), tmp_path / "begin.pt")
    flags = [
        "--model", name, "--dataset-type", "synthetic", "--train-num-samples", "4", "--batch-size", "2",
        "--workers", "0",
        "--epochs", "2", "--lr", "1e-2", "--warmup", "1", "--log-every-n-steps", "1", "--device", "cpu",
        "--precision", "fp32", "--logs", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(open_clip_main, "setup_logging", lambda *_: None)  # it would leave handlers behind
    assert open_clip_main.main([*flags, "--name", "stock", "--resume", str(tmp_path / "begin.pt")]) is None
    theirs = tmp_path / "stock" / "checkpoints"
    assert ov2(["train", *flags, "--name", "ours", "--resume", str(theirs / "epoch_1.pt")]) == 0
    assert_equal_weights(weights(tmp_path / "ours" / "checkpoints" / "stage_1.pt"), weights(theirs / "epoch_2.pt"))
    assert [record["samples_seen"] for record in results(tmp_path / "ours", "train")] == [6, 8]
    assert ov2(["train", *flags, "--name", "no", "--resume", str(theirs / "epoch_2.pt")]) == 2


def test_remote_sync_keeps_a_copy_from_which_an_empty_machine_resumes(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fsspec's `memory:` store. Oracles: the files of the run's folder, and the run that was not interrupted."""
    flags = [*run_flags(squares, vocabulary, tmp_path), *SAVING, "--save-most-recent"]
    flags += ["--remote-sync", "memory://runs", "--remote-sync-frequency", "1", "--remote-sync-protocol", "fsspec"]
    store, run = fsspec.filesystem("memory"), tmp_path / "run"
    assert ov2(["train", *flags]) == 0
    here = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert here.pop("checkpoints/epoch_latest.pt") == here["checkpoints/stage_1.pt"]
    there = {name.removeprefix("/runs/run/"): store.cat(name) for name in store.find("/runs/run")}
    assert there.keys() == here.keys()
    assert {name for name in here if here[name] != there[name]} <= {"out.log"}  # which says that all is there
    whole, last = figures(run), weights(run / "checkpoints" / "stage_1.pt")

    shutil.rmtree(run)
    store.rm_file("/runs/run/checkpoints/stage_1.pt")  # as if the machine had died before
    assert ov2(["train", *flags, "--resume", "latest"]) == 0
    assert checkpoints(run) == ["stage_1_samples_24.pt", "stage_1.pt"]
    assert figures(run) == whole
    assert_equal_weights(weights(run / "checkpoints" / "stage_1.pt"), last)

    assert ov2(["train", *flags, "--resume", "memory://runs/run/checkpoints/stage_1_samples_16.pt"]) == 0
    (aside,) = (run / "checkpoints").glob("replaced-*")
    names = {name.removeprefix("/runs/run/checkpoints/") for name in store.find("/runs/run/checkpoints")}
    assert {f"{aside.name}/stage_1_samples_24.pt", f"{aside.name}/stage_1.pt"} < names
    assert figures(run) == whole
    assert store.cat("/runs/run/results.jsonl") == (run / "results.jsonl").read_bytes()
    assert "is copied to memory://runs/run every 1 s" in (run / "out.log").read_text()

    records = store.cat("/runs/run/results.jsonl")
    shutil.rmtree(run)
    only = flags.index("--train-data")
    assert ov2(["train", *flags[:only], *flags[only + 2 :]]) == 2  # a validation of the same name
    assert "this is a training run; give its validation another --name" in capsys.readouterr().err
    assert not (run / "run.json").exists()
    assert store.cat("/runs/run/results.jsonl") == records


def test_remote_sync_that_fails_is_counted_and_the_run_continues(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the copy needs a folder. Oracles: the run's end and its log; nothing is made of a wrong address."""
    remote = tmp_path / "remote"
    (remote / "run").mkdir(parents=True)
    (remote / "run" / "checkpoints").touch()
    flags = [*run_flags(squares, vocabulary, tmp_path), "--remote-sync"]
    assert ov2(["train", *flags, f"file://{remote}"]) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "REMOTE SYNC FAILED: checkpoints/stage_1.pt" in log
    assert "1 failures so far" in log
    assert (remote / "run" / "results.jsonl").read_bytes() == (tmp_path / "run" / "results.jsonl").read_bytes()
    for address, why in (
        (f"file://{remote}/run/checkpoints", "cannot be written"),
        ("https://host/runs", "cannot be written; expected a folder or one of s3:"),
        (str(tmp_path), "this is where the run itself is"),
        (f"file://{tmp_path}/new/copy", "this is where the run itself is"),
    ):
        capsys.readouterr()
        assert ov2(["train", *flags, address, "--name", "new"]) == 2
        assert why in capsys.readouterr().err.strip().splitlines()[-1]


def test_remote_sync_after_a_signal(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """To this process, once it trains. Oracle: the checkpoint that the signal made is there when the run has ended."""
    run, remote = tmp_path / "run", tmp_path / "remote" / "run"
    flags = [*run_flags(squares, vocabulary, tmp_path), "--train-num-samples", "40000"]

    def stop() -> None:
        while samples_of(run) < 16:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert ov2(["train", *flags, "--remote-sync", f"file://{remote.parent}"]) == INTERRUPTED_STATUS
    (saved,) = list_checkpoints(run / "checkpoints")
    assert (remote / "checkpoints" / saved.name).read_bytes() == saved.read_bytes()
    assert json.loads((remote / "status.json").read_text())["state"] == "interrupted"


def images_by_class(
    folder: Path, ranked: Sequence[Sequence[int]], names: Sequence[str], images: Sequence[Path]
) -> None:
    """The first image in the folder of the class that is first in its row of `ranked`, the others as 3rd and 901st."""
    for image, row, place in zip(images, ranked, (0, 2, 900)[: len(images)], strict=True):
        (folder / names[row[place]]).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / names[row[place]] / image.name)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


SYNSETS, NUMBERS = ImageNetInfo().label_names(), [str(number) for number in range(1000)]


def test_imagenet_val_and_v2_of_an_ov2_model_go_by_likelihood(
    squares: Path, vocabulary: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the sum of cross-entropies of each class's caption from the model's plain forward pass, one image at a
    time, after which the images are put into folders of known rank. In training they come at --zeroshot-frequency."""
    flags = [*run_flags(squares, vocabulary, tmp_path), "--keep-ratio", "1", "--report-to", "tensorboard"]
    assert ov2(["train", *flags, "--name", "first"]) == 0
    run = open_model(tmp_path / "first")
    texts = run.tokenizer([f"a photo of a {name}." for name in open_clip.IMAGENET_CLASSNAMES])
    ranked = []
    for path in images:
        pixels = run.preprocess(Image.open(path).convert("RGB")).expand(1000, -1, -1, -1)
        targets = caption_targets(texts, run.model.text_config.eos_id)
        with torch.no_grad():
            logits = run.model(pixels, texts)["logits"]
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        ranked.append(nll.view(1000, -1).sum(dim=1).double().round(decimals=4).argsort(stable=True).tolist())
    sets = {"--imagenet-val": tmp_path / "val", "--imagenet-v2": tmp_path / "v2"}
    images_by_class(sets["--imagenet-val"], ranked, SYNSETS, images)
    images_by_class(sets["--imagenet-v2"] / "ImageNetV2-matched-frequency", ranked[:1], NUMBERS, images[:1])
    more = [str(word) for pair in sets.items() for word in pair]
    alone = ["--model", f"local-dir:{tmp_path / 'first'}", "--keep-ratio", "1", "--workers", "0", "--batch-size", "2"]
    assert ov2(["train", *alone, *more, "--logs", str(tmp_path), "--name", "alone"]) == 0
    (row,) = results(tmp_path / "alone", "val")
    found = {name: value for name, value in row.items() if "zeroshot" in name}
    assert found == {
        "imagenet-zeroshot-val-top1": pytest.approx(1 / 3), "imagenet-zeroshot-val-top5": pytest.approx(2 / 3),
        "imagenetv2-zeroshot-val-top1": 1.0, "imagenetv2-zeroshot-val-top5": 1.0,
    }  # fmt: skip

    assert ov2(["train", *flags, *more, "--epochs", "3", "--zeroshot-frequency", "2"]) == 0
    rows = results(tmp_path / "run", "val")
    assert [row["samples_seen"] for row in rows] == [32, 48]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    shown = [event.value for event in board.Scalars("val/imagenet-zeroshot-val-top5")]
    assert shown == pytest.approx([row["imagenet-zeroshot-val-top5"] for row in rows])
    assert "imagenetv2-zeroshot-val-top1" in (tmp_path / "run" / "out.log").read_text()
    (tmp_path / "val" / "cat").mkdir()
    capsys.readouterr()
    assert ov2(["train", *flags, *more, "--name", "wrong"]) == 2
    assert "one for each class, called by its synset" in capsys.readouterr().err.strip().splitlines()[-1]


def test_imagenet_val_of_clip_is_open_clips(baselines: Path, images: list[Path], tmp_path: Path) -> None:
    """Oracle: OpenCLIP's own build_zero_shot_classifier with its names and prompts."""
    folder = tmp_path / "clip"
    shutil.copytree(baselines / "clip_tiny", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"context_length": 10, "width": 16, "heads": 1}  # of 80,000 prompts
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    names, prompts = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    tokenizer = caching(open_clip.get_tokenizer(f"local-dir:{folder}"))  # the same ids (test_caching.py), in a tenth
    classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, names, prompts)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in images])
        ranked = (model.encode_image(pixels, normalize=True) @ classifier).argsort(dim=1, descending=True).tolist()
    images_by_class(tmp_path / "val", ranked, SYNSETS, images)
    flags = ["--model", f"local-dir:{folder}", "--imagenet-val", str(tmp_path / "val"), "--workers", "0"]
    assert ov2(["train", *flags, "--logs", str(tmp_path), "--name", "run"]) == 0
    (row,) = results(tmp_path / "run", "val")
    assert row["imagenet-zeroshot-val-top1"] == pytest.approx(1 / 3)
    assert row["imagenet-zeroshot-val-top5"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("best", "stays"),
    [("stage_1_samples_10.pt", True), ("stage_1_samples_60.pt", False), ("stage_1_samples_70.pt", False)],
)
def test_resume_keeps_the_note_of_the_best_checkpoint_unless_that_goes(tmp_path: Path, best: str, stays: bool) -> None:
    """Oracle: the files. Checkpoints after 10 and 60 samples; the run goes back to 50."""
    from open_clip_ov2.openclip.run.run_folder import put_beginning

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for samples in (10, 60):
        (folder / f"stage_1_samples_{samples}.pt").touch()
    (folder / "best.json").write_text(json.dumps({"file": best, "caption_loss": 1.0}))
    content = {RESUME_KEY: {"stage": 1, "stage_done": False, "samples_seen": 50}}
    (folder / "epoch_latest.pt").symlink_to("stage_1_samples_60.pt")
    put_beginning(SimpleNamespace(folder=tmp_path), "elsewhere.pt", content, None)  # type: ignore[arg-type]
    assert not (folder / "epoch_latest.pt").is_symlink()
    assert [path.name for path in list_checkpoints(folder)] == ["stage_1_samples_10.pt", "stage_1_samples_50.pt"]
    assert (folder / "best.json").exists() == stays

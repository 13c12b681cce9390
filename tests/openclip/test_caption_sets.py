"""Caption sets in every command that reads tars. Oracle: the same captions as JSON fields of the tars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_resume import as_if_killed_after, common
from training import assert_equal_weights, figures, weights

from open_clip_ov2 import evaluate
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sidecars import begin_set, read_sidecar, sidecar_path, write_sidecar
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.train.checkpoint import list_checkpoints


@pytest.fixture(scope="module")
def sets(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train and val: captions that are the tars' json:recaption."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("train", "val"):
        begin_set(folder / name, {"made_by": "a test", "of": name})
        for tar in sorted((squares / name).glob("*.tar")):
            samples = read_tar(str(tar), pytest.fail)
            lines = [{"key": one["__key__"], "caption": json.loads(one["json"])["recaption"]} for one in samples]
            write_sidecar(sidecar_path(folder / name, tar.name), lines)
    return folder


def test_training_from_sidecars_is_training_from_json_fields(
    squares: Path, sets: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit at every step, and resumed after the second; other settings are another run."""
    more = ["--workers", "2", "--save-every-steps", "1", "--keep-checkpoints", "99", "--report-to", "tensorboard"]
    fields = ["--caption-keys", "json:recaption=0.6,txt=0.4"]
    recap = ["--captions", f"recap={sets}/train", "--val-captions", f"recap=pipe:cat {sets}/val/{{shard}}.jsonl.gz"]
    recap += ["--caption-keys", "recap:caption=0.6,txt=0.4"]
    assert ov2(["train", *common(squares, vocabulary, tmp_path / "json"), *more, *fields]) == 0
    assert ov2(["train", *common(squares, vocabulary, tmp_path / "whole"), *more, *recap]) == 0
    whole = tmp_path / "whole" / "run"
    assert figures(whole) == figures(tmp_path / "json" / "run")
    files = list_checkpoints(whole / "checkpoints")
    assert len(files) == 4
    for path in files:
        assert_equal_weights(weights(path), weights(tmp_path / "json" / "run" / "checkpoints" / path.name))
    resumed = as_if_killed_after(whole, files[1], tmp_path / "resumed")
    assert ov2(["train", *common(squares, vocabulary, tmp_path / "resumed"), *more, *recap]) == 0
    assert figures(resumed) == figures(whole)
    assert_equal_weights(weights(resumed / "checkpoints" / files[-1].name), weights(files[-1]))

    again = common(squares, vocabulary, tmp_path / "whole")
    capsys.readouterr()
    problems = {
        "captions: {'recap': '": ["--captions", f"recap={sets}/val/{{shard}}.jsonl.gz", *recap[2:]],
        "3 of 4 tars have no sidecar": ["--captions", f"recap={sets}/val", *recap[2:], "--override"],
        "no caption is read from it": [*recap, "--captions", f"other={sets}/train"],
        "expected NAME=FOLDER": ["--captions", str(sets)],
        "--captions without tars: it has no effect": [*recap, "--dataset-type", "csv"],
    }
    for message, flags in problems.items():
        assert ov2(["train", *again, *more, *flags]) == 2, message
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error
    assert figures(whole) == figures(tmp_path / "json" / "run")

    tar, model = f"{squares}/val/00000.tar", str(whole)
    options = {"data": tar, "tasks": "caption-loss", "device": "cpu"}
    by_field = evaluate(model, caption_keys="json:recaption", **options)
    assert evaluate(model, caption_keys="recap", captions={"recap": f"{sets}/val"}, **options) == by_field

    assert by_field["caption-loss"]["num_samples"] == 10
    command = ["caption", tar, "--checkpoint", model, "--device", "cpu", "--limit", "3", "--json"]
    capsys.readouterr()
    assert ov2([*command, "--caption-keys", "json:recaption"]) == 0
    found = capsys.readouterr().out
    assert ov2([*command, "--caption-keys", "recap", "--captions", f"recap={sets}/val"]) == 0
    assert capsys.readouterr().out == found


def test_a_resize_takes_its_sets_along(squares: Path, sets: Path, tmp_path: Path) -> None:
    tar, recap = f"{squares}/val/00000.tar", f"recap={sets}/val"
    small = tmp_path / "small"
    assert ov2(["shards", "resize", tar, str(small), "--short-side", "16", "--captions", recap]) == 0
    before = list(read_sidecar(sets / "val" / "00000.jsonl.gz"))
    assert list(read_sidecar(small / "recap" / "00000.jsonl.gz")) == before
    assert json.loads((small / "recap" / "settings.json").read_text())["resized"]["of"] == "val"
    assert ov2(["shards", "resize", tar, str(small), "--short-side", "16", "--captions", recap]) == 0
    assert ov2(["shards", "resize", tar, str(small), "--short-side", "16"]) == 2
    joined = WebDatasetSource((str(small / "00000.tar"),)).in_order()
    assert [one["__key__"] for one in joined] == [line["key"] for line in before]

"""`ov2 compare` from end to end on real tars: one arm, one seed, because each run is a process with its imports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from open_clip_ov2.cli import main as ov2

FILE = """
title = "Squares"
samples = 64
seeds = [3]
resolution = 24
[flags]
tokenizer = "{vocabulary}"
augmentation = "family"
batch-size = 8
lr = 1e-3
warmup = 1
workers = 0
precision = "fp32"
val-every-samples = 32
sample-captions = 0
[measure]
repetitions = 1
samples = 64
[[arm]]
name = "CLIP"
model = "clip-of-ov2-vit-nano-8"
[[metric]]
key = "run.clip_val_loss"
title = "contrastive loss"
better = "lower"
learning = "clip_val_loss"
"""


def test_compare(squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the run's own results.jsonl; the same command again trains nothing and writes the same page."""
    file, out = tmp_path / "squares.toml", tmp_path / "out"
    file.write_text(FILE.format(vocabulary=vocabulary))
    line = ["compare", str(file), "--train-data", f"{squares}/train/{{00000..00003}}.tar", "--out", str(out)]
    line += ["--val-data", f"{squares}/val/00000.tar"]
    assert ov2(line) == 0, capsys.readouterr().err
    (results,) = out.glob("runs/*/results.jsonl")
    records = [json.loads(text) for text in results.read_text().splitlines()]
    losses = [row["clip_val_loss"] for row in records if row["kind"] == "val"]
    assert [row["samples_seen"] for row in records if row["kind"] == "val"] == [32, 64]
    (arm,) = json.loads((out / "results.json").read_text())[0]["arms"]
    assert arm["values"] == {"run.clip_val_loss": [losses[-1]]}
    assert arm["learning"]["run.clip_val_loss"] == [[[32, losses[0]], [64, losses[1]]]]
    assert arm["rates"][0] > 0
    rows = {row["quantity"]: row for row in csv.DictReader((out / "results.csv").open())}
    assert float(rows["run.clip_val_loss"]["mean"]) == pytest.approx(losses[-1], rel=1e-5)
    assert float(rows["samples"]["mean"]) == 64
    page, before = (out / "index.html").read_text(), results.stat().st_mtime_ns
    assert "squares-run-clip-val-loss-over-seconds" in page
    capsys.readouterr()
    assert ov2(line) == 0
    assert "training: 1 of 1 are done already" in capsys.readouterr().out
    assert (out / "index.html").read_text() == page
    assert results.stat().st_mtime_ns == before


def test_slips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.toml"
    file.write_text('samples = 8\nresolution = 24\n[[arm]]\nname = "a"\nmodel = "ov2-vit-nano-9"\n')
    data = ["--train-data", "x.tar", "--val-data", "y.tar", "--out", str(tmp_path / "out")]
    assert ov2(["compare", str(file), *data, "--jobs", "0"]) == 2
    assert "--jobs: '0' is not a whole number from 1 on" in capsys.readouterr().err
    assert ov2(["compare", str(file), str(file), *data]) == 2
    assert "two comparisons are called one" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data]) == 2
    told = capsys.readouterr().err
    assert "arm a: --model ov2-vit-nano-9: no such model; near: ov2-vit-nano-8" in told
    assert told.count("\n") == 1

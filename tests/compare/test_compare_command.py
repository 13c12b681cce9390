"""`ov2 compare` from end to end on real tars: one variant, one seed, because each run is a process with its imports."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from open_clip_ov2 import training
from open_clip_ov2.argv import value_of
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.compare.bench.settings import CaptionLengths, Job
from open_clip_ov2.compare.config import Comparison, Measure, Variant, VariantStage
from open_clip_ov2.compare.measuring import cached, job_of, measure_cost
from open_clip_ov2.compare.plan import Study
from open_clip_ov2.compare.study import unlike
from open_clip_ov2.errors import UserError
from open_clip_ov2.locks import LOCK, FolderLock

FILE = """
title = "Squares"
samples = 64
seeds = [3]
resolution = 24
[flags]
tokenizer = "{vocabulary}"
augmentation = "family"
batch-size = 8
lr = 1e-4
warmup = 1
workers = 0
precision = "fp32"
val-every-samples = 32
sample-captions = 0
[measure]
repetitions = 1
samples = 64
caption-tokens = "3:8:5"
largest-batch = true
memory-limit-gb = 0.06
[search]
lr = [1e-6, 1e-3]
[[arm]]
name = "CLIP"
model = "clip-of-ov2-vit-nano-8"
[[metric]]
key = "run.clip_val_loss"
title = "contrastive loss"
better = "lower"
learning = "clip_val_loss"
"""


def test_compare(squares: Path, vocabulary: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: the run's own results.jsonl; the same command again trains nothing and writes the same page. Of the runs
    that search the learning rate, the one with the lower loss is the seed's run."""
    file, out = tmp_path / "squares.toml", tmp_path / "out"
    file.write_text(FILE.format(vocabulary=vocabulary))
    line = ["compare", str(file), "--train-data", f"{squares}/train/{{00000..00003}}.tar", "--out", str(out)]
    line += ["--val-data", f"{squares}/val/00000.tar"]
    with FolderLock(out):  # as a second `ov2 compare` finds it
        assert ov2(line) == 2
        assert f"{out}: process {os.getpid()} on " in capfd.readouterr().err
        assert os.listdir(out) == [LOCK]
    status, printed = ov2(line), capfd.readouterr()
    assert status == 0, printed.err
    assert "profiler" not in printed.err
    files = list(out.glob("runs/*/results.jsonl"))
    runs = {file: [json.loads(row) for row in file.read_text().splitlines()] for file in files}
    assert len(runs) == 2
    last = {file: [row["loss"] for row in rows if row["kind"] == "train"][-1] for file, rows in runs.items()}
    results = min(last, key=last.__getitem__)
    records = runs[results]
    assert value_of(json.loads((results.parent / "run.json").read_text())["command"], "--lr") == "0.001"
    assert "training: 1 of 1 are done already" in printed.out
    losses = [row["clip_val_loss"] for row in records if row["kind"] == "val"]
    assert [row["samples_seen"] for row in records if row["kind"] == "val"] == [32, 64]
    (arm,) = json.loads((out / "results.json").read_text())[0]["arms"]
    assert arm["values"] == {"run.clip_val_loss": [losses[-1]]}
    assert arm["learning"]["run.clip_val_loss"] == [[[32, losses[0]], [64, losses[1]]]]
    assert arm["rates"][0] > 0
    assert 0 < arm["cost"]["step_memory_mb"] < 20
    assert arm["cost"]["largest_batch"] % 8 == 0 < arm["cost"]["largest_batch"]
    rows = {row["quantity"]: row for row in csv.DictReader((out / "results.csv").open())}
    assert float(rows["run.clip_val_loss"]["mean"]) == pytest.approx(losses[-1], rel=1e-5)
    assert float(rows["samples"]["mean"]) == 64
    page, before = (out / "index.html").read_text(), results.stat().st_mtime_ns
    costs = (out / "costs.json").stat().st_mtime_ns
    assert "squares-run-clip-val-loss-over-seconds" in page
    assert "--batch-size 8" in page
    capfd.readouterr()
    assert ov2(line) == 0
    assert "training: 1 of 1 are done already" in capfd.readouterr().out
    assert (out / "index.html").read_text() == page
    assert results.stat().st_mtime_ns == before
    assert (out / "costs.json").stat().st_mtime_ns == costs
    assert ov2([*line[:-1], f"{squares}/train/00000.tar"]) == 2  # another held-out set in the same folder
    assert "validated with another --val-data" in capfd.readouterr().err


def test_a_variant_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """Oracle: the allocator, which is asked for terabytes."""
    size = ("--force-image-size", "64", "--batch-size", str(10**10), "--precision", "fp32", "--device", "cpu")
    argv = ("--model", "ov2-bench-tiny", "--dataset-type", "synthetic", "--train-num-samples", str(10**10), *size)
    job = Job("huge", argv, "ov2-bench-tiny", "cpu", CaptionLengths(3, 8, 5.0), threads=1)
    with pytest.raises(UserError, match="a batch of 10,000,000,000 does not fit into memory"):
        measure_cost(job, 10**10, False, tmp_path / "costs.json", lambda _: None)
    assert not (tmp_path / "costs.json").exists()


def test_a_cache_measures_once(tmp_path: Path) -> None:
    """Oracle: counted calls. A file that is not a cache is an error."""
    calls: list[int] = []
    for _ in range(2):
        assert cached(tmp_path / "speed.json", ["key"], lambda: calls.append(1) or len(calls)) == 1
    (tmp_path / "speed.json").write_text("[]")
    with pytest.raises(UserError, match="expected measurements of `ov2 compare`"):
        cached(tmp_path / "speed.json", ["key"], lambda: 1)


def test_what_two_variants_do_not_share(squares: Path, tmp_path: Path) -> None:
    """Oracle: by hand. OpenCLIP's defaults for CLIP are not those of ov2 models, and the file says nothing of them."""
    argv = ["--train-data", f"{squares}/train/00000.tar", "--stage", "24:samples=8", "--batch-size", "8"]
    ours, clip = (
        training.planned_run(["--model", name, *argv, "--logs", str(tmp_path)]).config
        for name in ("ov2-vit-nano-8", "clip-of-ov2-vit-nano-8")
    )
    differing = unlike(clip, ours)
    assert {"beta2 0.98 (0.95)", "eps 1e-06 (1e-08)"} <= set(differing)
    assert not [text for text in differing if text.startswith(("model", "epochs"))]
    assert unlike(ours, ours) == ()


def test_what_is_measured_is_the_variant(tmp_path: Path) -> None:
    """Oracle: by hand. Its last stage with its flags, without tasks of validation; captions of the first ov2 model."""
    stages = (VariantStage(24, 0.5), VariantStage(32, 0.5))
    half = Variant("half", "clip-of-ov2-vit-nano-8", {"warmup": 1, "lock-image": True}, stages)
    ours = Variant("ours", "ov2-vit-ti-16", {}, stages)
    flags = {"batch-size": 8, "device": "cpu", "eval": "--tasks knn --data x", "eval-every-samples": 8}
    comparison = Comparison(samples=64, flags=flags, variants=(half, ours), reference="half")
    study = Study((comparison,), "a.tar", "b.tar", "a.tar", ("--wd", "0.2"), tmp_path, tmp_path)
    job = job_of(study, comparison, half)
    assert job.argv == (
        "--model", "clip-of-ov2-vit-nano-8", "--train-data", "a.tar", "--batch-size", "8", "--device", "cpu",
        "--wd", "0.2", "--warmup", "1", "--lock-image", "--stage", "32:samples=8",
    )  # fmt: skip
    assert (job.captions_of, job.device, job.memory_limit_gb) == ("ov2-vit-ti-16", "cpu", None)
    with pytest.raises(UserError, match="it needs memory-limit-gb"):
        job_of(study, replace(comparison, measure=Measure(largest_batch=True)), half)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.toml"
    file.write_text('samples = 8\nresolution = 24\n[[arm]]\nname = "a"\nmodel = "ov2-vit-nano-9"\n')
    data = ["--train-data", "x.tar", "--val-data", "y.tar", "--out", str(tmp_path / "out")]
    assert ov2(["compare", str(file), *data, "--jobs", "0"]) == 2
    assert "--jobs: 0: expected an integer >= 1" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data, "--scale", "0"]) == 2
    assert "--scale: 0: expected a number > 0" in capsys.readouterr().err
    assert ov2(["compare", str(file), str(file), *data]) == 2
    assert "two comparisons are called one" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data, "--", "--model=ov2-vit-b-16"]) == 2
    assert "--model=ov2-vit-b-16 after `--`" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data, "--", "--report-to", "model"]) == 2
    assert "after `--`" not in capsys.readouterr().err
    good = file.read_text().replace("nano-9", "nano-8")
    file.write_text(f'{good}[flags]\nbatch-size = 8\n[[evaluate]]\ntasks = ["kmm"]\n')
    assert ov2(["compare", str(file), *data]) == 2
    assert "one: evaluate: --tasks: unknown task 'kmm'" in capsys.readouterr().err
    file.write_text(f'{good}[[evaluate]]\ntasks = ["knn"]\nflags = {{ device = "cpu", keep-ratio = 2 }}\n')
    assert ov2(["compare", str(file), *data]) == 2
    error = capsys.readouterr().err
    assert "one: evaluate: the flags '--data y.tar --tasks knn --keep-ratio 2': " in error
    assert "--keep-ratio: 2: expected" in error
    file.write_text(f'{good}[[baseline]]\nname = "pixels"\nresults = "{tmp_path}/no.json"\n')
    assert ov2(["compare", str(file), *data]) == 2
    assert f"one: baseline pixels: {tmp_path}/no.json: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    file.write_text(good.replace("nano-8", "nano-9"))
    assert ov2(["compare", str(file), *data]) == 2
    error = capsys.readouterr().err
    assert "variant a: stage 1 (24 px): --model ov2-vit-nano-9: no such model; did you mean ov2-vit-nano-8" in error
    assert error.count("\n") == 1

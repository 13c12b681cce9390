"""`ov2 compare` from end to end on real tars: one arm, one seed, because each run is a process with its imports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.compare import trainer
from open_clip_ov2.compare.bench.cases import CaptionLengths, Case, Job
from open_clip_ov2.compare.config import Arm, ArmStage, Measure
from open_clip_ov2.compare.costs import measure_cost
from open_clip_ov2.compare.measuring import without_tasks
from open_clip_ov2.errors import UserError

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
caption-tokens = "3:8:5"
largest-batch = true
memory-limit-gb = 0.2
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
    assert 0 < arm["cost"]["step_memory_mb"] < 20
    assert arm["cost"]["largest_batch"] % 8 == 0 < arm["cost"]["largest_batch"]
    rows = {row["quantity"]: row for row in csv.DictReader((out / "results.csv").open())}
    assert float(rows["run.clip_val_loss"]["mean"]) == pytest.approx(losses[-1], rel=1e-5)
    assert float(rows["samples"]["mean"]) == 64
    page, before = (out / "index.html").read_text(), results.stat().st_mtime_ns
    costs = (out / "costs.json").stat().st_mtime_ns
    assert "squares-run-clip-val-loss-over-seconds" in page
    assert "--batch-size 8" in page
    capsys.readouterr()
    assert ov2(line) == 0
    assert "training: 1 of 1 are done already" in capsys.readouterr().out
    assert (out / "index.html").read_text() == page
    assert results.stat().st_mtime_ns == before
    assert (out / "costs.json").stat().st_mtime_ns == costs
    assert ov2([*line[:-1], f"{squares}/train/00000.tar"]) == 2  # another held-out set in the same folder
    assert "validated with another --val-data" in capsys.readouterr().err


def test_an_arm_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """Oracle: the allocator, which is asked for terabytes."""
    case = Case(64, "fp32", 10**10)
    lengths = CaptionLengths(3, 8, 5.0)
    job = Job("huge", "ov2-bench-tiny", "ov2-bench-tiny", case, "cpu", False, None, None, lengths, None, 1)
    with pytest.raises(UserError, match="arm huge: a batch of 10000000000 at 64 px does not fit into memory"):
        measure_cost(job, False, tmp_path, lambda _: None)
    assert not (tmp_path / "costs.json").exists()


def test_measured_lines_have_no_tasks() -> None:
    """Oracle: by hand."""
    line = ["--lr", "1", "--eval", "--tasks knn --data x", "--eval-every-samples=8", "--eval-keep-ratio", "1"]
    assert without_tasks(line) == ["--lr", "1", "--eval-keep-ratio", "1"]


def test_what_two_arms_do_not_share(squares: Path, tmp_path: Path) -> None:
    """Oracle: by hand. OpenCLIP's defaults for CLIP are not the family's, and nobody said them here."""
    argv = ["--train-data", f"{squares}/train/00000.tar", "--stage", "24:samples=8", "--batch-size", "8"]
    ours, clip = (
        trainer.look_at(["--model", name, *argv], tmp_path) for name in ("ov2-vit-nano-8", "clip-of-ov2-vit-nano-8")
    )
    told = trainer.unlike(clip, ours)
    assert {"beta2 0.98 (0.95)", "eps 1e-06 (1e-08)"} <= set(told)
    assert not [text for text in told if text.startswith(("model", "epochs"))]
    assert trainer.unlike(ours, ours) == ()


def test_what_is_measured_is_the_arm(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: by hand. Its model, last stage, flags and vocabulary; captions of the ov2 model among the arms."""
    flags = {"batch-size": 8, "warmup": 1, "precision": "amp_bf16"}
    arm = Arm("half", "clip-of-ov2-vit-nano-8", flags, (ArmStage(24, 0.5), ArmStage(32, 0.5)), True)
    argv = ["--model", arm.model, "--train-data", f"{squares}/train/00000.tar", "--stage", "32:samples=8"]
    argv += ["--batch-size", "8", "--warmup", "1", "--precision", "amp_bf16", "--tokenizer", str(vocabulary)]
    argv += ["--grad-checkpointing", "--force-context-length", "9", "--force-patch-dropout", "0.5"]
    models = ["ViT-B-32", "ov2-vit-ti-16"]
    measure = Measure(lengths=CaptionLengths(3, 8, 5.0))
    job = trainer.contender(arm, argv, tmp_path, models, measure, 2)
    assert isinstance(job, Job)
    device = job.device
    assert job == Job(
        arm="half", model="clip-of-ov2-vit-nano-8", words_of="ov2-vit-ti-16", case=Case(32, "amp_bf16", 8),
        device=device, compile=False, memory_budget=None, keep_ratio=None, lengths=CaptionLengths(3, 8, 5.0),
        memory_limit_gb=None, threads=2 if device == "cpu" else None, tokenizer=str(vocabulary),
        context_length=9, patch_dropout=0.5, fusion=None, grad_checkpointing=True,
    )  # fmt: skip
    ours = ["--model", "ov2-vit-nano-8", *argv[2:], "--keep-ratio", "0.25:0.5", "--fusion", "causal"]
    job = trainer.contender(arm, ours, tmp_path, models[:1], measure, 2)
    assert isinstance(job, Job)
    assert (job.keep_ratio, job.fusion, job.words_of) == (0.5, "causal", "ov2-vit-nano-8")
    told = trainer.contender(arm, [*argv, "--accum-freq", "2"], tmp_path, models, measure, 2)
    assert told == "`ov2 bench` has no --accum-freq"
    if device == "cpu":
        with pytest.raises(UserError, match="say memory-limit-gb"):
            trainer.contender(arm, ours, tmp_path, models, Measure(largest_batch=True), 2)


def test_slips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.toml"
    file.write_text('samples = 8\nresolution = 24\n[[arm]]\nname = "a"\nmodel = "ov2-vit-nano-9"\n')
    data = ["--train-data", "x.tar", "--val-data", "y.tar", "--out", str(tmp_path / "out")]
    assert ov2(["compare", str(file), *data, "--jobs", "0"]) == 2
    assert "--jobs: '0' is not a whole number from 1 on" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data, "--scale", "0"]) == 2
    assert "--scale: '0' is not a number above 0" in capsys.readouterr().err
    assert ov2(["compare", str(file), str(file), *data]) == 2
    assert "two comparisons are called one" in capsys.readouterr().err
    assert ov2(["compare", str(file), *data, "--", "--model=ov2-vit-b-16"]) == 2
    assert "--model=ov2-vit-b-16 after `--`" in capsys.readouterr().err
    good = file.read_text().replace("nano-9", "nano-8")
    file.write_text(f'{good}[flags]\nbatch-size = 8\n[[evaluate]]\ntasks = ["kmm"]\n')
    assert ov2(["compare", str(file), *data]) == 2
    assert "one: [[evaluate]] --tasks kmm: no such task" in capsys.readouterr().err
    file.write_text(good.replace("nano-8", "nano-9"))
    assert ov2(["compare", str(file), *data]) == 2
    told = capsys.readouterr().err
    assert "arm a: --model ov2-vit-nano-9: no such model; near: ov2-vit-nano-8" in told
    assert told.count("\n") == 1

"""A run's folder that version 0.1.0 left in the middle of its first stage, before the code was moved, is resumed.

old_run/ was made by commit c6ac6f3 with the flags below: its checkpoint at 24 samples, and records of the whole run.
Oracle: those records, which other CPUs round differently.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from square_shards import write_square_shards
from training import results

from open_clip_ov2 import open_model
from open_clip_ov2.cli import main as ov2

OLD = Path(__file__).parent / "old_run"
FLAGS = [
    "--train-data", "train/{00000..00003}.tar", "--val-data", "val/00000.tar", "--workers", "0", "--batch-size", "8",
    "--lr", "1e-3", "--warmup", "1", "--log-every-n-steps", "1", "--model", "local-dir:tiny",
    "--force-context-length", "12", "--tokenizer", "vocabulary", "--logs", "logs", "--name", "run",
    "--stage", "16:samples=48,lr=1e-3", "--stage", "24:samples=32,lr=5e-4,keep-ratio=0.5",
    "--save-every-steps", "1", "--keep-checkpoints", "99", "--report-to", "tensorboard",
]  # fmt: skip


def test_a_run_of_version_0_1_0_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    write_square_shards(tmp_path / "train", 4, 8)
    write_square_shards(tmp_path / "val", 1, 10, start=1000)
    monkeypatch.chdir(tmp_path)
    assert ov2(["train", *FLAGS]) == 0
    run = Path("logs/run")
    assert [row["samples_seen"] for row in results(run, "train")] == [8 * step for step in range(1, 11)]
    resumed = (run / "checkpoints").glob("stage_1_samples_*.pt")
    assert sorted(path.name for path in resumed) == [f"stage_1_samples_{count}.pt" for count in (24, 32, 40)]
    recorded = results(OLD / "logs" / "run", "train") + results(OLD / "logs" / "run", "val")
    for before, now in zip(recorded, results(run, "train") + results(run, "val"), strict=True):
        for name in before.keys() & {"caption_loss", "loss", "lr", "grad_norm"}:
            assert now[name] == pytest.approx(before[name], rel=1e-3), (name, before["samples_seen"])


def test_a_run_keeps_the_decoder_that_its_model_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` has another decoder by now. Oracle: the checkpoint's own decoder, which the run ends with."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    write_square_shards(tmp_path / "train", 4, 8)
    write_square_shards(tmp_path / "val", 1, 10, start=1000)
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path("tiny/open_clip_config.json").read_text())
    layers = config["model_cfg"]["decoder_cfg"]["layers"]
    config["model_cfg"]["decoder_cfg"]["layers"] = layers + 1
    Path("tiny/open_clip_config.json").write_text(json.dumps(config))
    assert ov2(["train", *FLAGS]) == 0
    assert open_model("logs/run").model.text_decoder.config.layers == layers
    written = json.loads(Path("logs/run/open_clip_config.json").read_text())
    assert written["model_cfg"]["decoder_cfg"]["layers"] == layers

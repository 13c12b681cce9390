"""Flags of OpenCLIP that say what becomes of a run: its checkpoints, copies, where it begins, zero-shot accuracy."""

from __future__ import annotations

from pathlib import Path

import torch
from training import TINY, data_flags

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.train.checkpoint import list_checkpoints


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

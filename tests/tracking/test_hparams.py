"""Flags in TensorBoard's hparams tab. Oracle: what was written."""

from __future__ import annotations

from pathlib import Path

from open_clip_ov2.tracking.hparams import read_hparams
from open_clip_ov2.tracking.sinks import TensorBoard


def test_hparams_come_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.write("train", 8, {"train/loss": 1.0}, {})
    board.hparams({"lr": 1e-3, "model": "ov2-vit-nano-8", "seed": 0, "locked": True, "keep_ratio": None}, {"loss": 1.0})
    board.close()
    assert read_hparams(tmp_path) == {
        "lr": 1e-3,
        "model": "ov2-vit-nano-8",
        "seed": 0,
        "locked": True,
        "keep_ratio": "None",
    }


def test_without_them_there_are_none(tmp_path: Path) -> None:
    assert read_hparams(tmp_path) == {}
    assert read_hparams(tmp_path / "nowhere") == {}
    board = TensorBoard(tmp_path)
    board.write("train", 8, {"train/loss": 1.0}, {})
    board.close()
    assert read_hparams(tmp_path) == {}

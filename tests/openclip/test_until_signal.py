"""A validation that a signal cuts short. Oracle: the batches taken, counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training import TINY, data_flags, results

from open_clip_ov2.cli import main
from open_clip_ov2.openclip.run import validation
from open_clip_ov2.openclip.run.validation import until_signal
from open_clip_ov2.train.signals import StopSignals


def test_the_batch_at_hand_is_the_last() -> None:
    """A real signal to this process."""
    with StopSignals() as signals:
        assert list(until_signal(range(5), signals)) == [0, 1, 2, 3, 4]
        taken = []
        for batch in until_signal(range(5), signals):
            taken.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [0, 1]


def test_a_validation_that_is_cut_short_has_no_result(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the run's records. A real signal; only its moment, after the first of two batches, is chosen here."""
    whole = validation.until_signal

    def cut(loader: Any, *rest: Any) -> Iterator[Any]:
        for batch in whole(loader, *rest):
            yield batch
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(validation, "until_signal", cut)
    flags = [
        *TINY,
        *data_flags(squares, 16),
        "--epochs",
        "1",
        "--val-every-samples",
        "8",
        "--logs",
        str(tmp_path),
        "--name",
        "cut",
    ]
    assert main(["train", *flags]) == 75
    assert results(tmp_path / "cut", "train")
    assert results(tmp_path / "cut", "val") == []

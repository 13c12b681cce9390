"""`ov2 vlm train` in real processes: killed, told to stop, resumed, on one process and on two."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "openclip"))

from training import Rank, finish, results, start_ranks, wait_for

from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.tracking.status import FINISHED, read_status


def _vlm_train(*flags: str) -> int:
    from open_clip_ov2.cli import main

    return main(["vlm", "train", *flags])


def flags(parts: Path, out: Path, **more: object) -> list[str]:
    """A run of two stages of three steps each; saved after each step."""
    values = {
        "recipe": parts / "recipe.toml", "language-model": parts / "lm", "out": out, "workers": 0, "batch-size": 2,
        "save-every-steps": 1, "log-every-n-steps": 1,
        **{f"{name}-data": parts / "data" / f"{name}.json" for name in ("align", "tune")},
        **{f"{name}-images": parts / "data" / "pictures" for name in ("align", "tune")},
        **more,
    }  # fmt: skip
    return [str(parts / "encoder"), *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def start(argv: Sequence[str], processes: int = 1) -> list[Rank]:
    return start_ranks(_vlm_train, argv, processes)


def train(argv: Sequence[str], processes: int = 1) -> None:
    done = finish(start(argv, processes))
    assert [status for status, _ in done] == [0] * processes, done


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def one(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, by one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(flags(parts, run))
    return run


def test_two_processes_train_the_same_model(parts: Path, one: Path, tmp_path: Path) -> None:
    """Oracle: one process with the same global batches, in two steps of accumulation: losses and weights."""
    train(flags(parts, tmp_path / "two"), processes=2)
    losses = [[row["loss"] for row in results(run, "train")] for run in (one, tmp_path / "two")]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    first, second = weights(one), weights(tmp_path / "two")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_continues_bit_for_bit(parts: Path, one: Path, tmp_path: Path, number: int) -> None:
    """Oracle: the undisturbed run's weights and records. The first stop is in stage 1, the second in stage 2."""
    run, argv = tmp_path / "run", flags(parts, tmp_path / "run")
    for samples in (4, 16):
        ranks = start(argv)
        assert wait_for(lambda samples=samples: seen(run) >= samples, ranks)
        if number == signal.SIGKILL:
            os.killpg(os.getpgid(ranks[0].pid), signal.SIGKILL)
        else:
            ranks[0].send_signal(number)
        ((status, errors),) = finish(ranks)
        assert status == (INTERRUPTED_STATUS if number == signal.SIGTERM else -signal.SIGKILL), errors
        assert seen(run) < 24, "the run was over before it was stopped"
    train(argv)
    again = weights(run)
    assert [name for name, value in weights(one).items() if not torch.equal(value, again[name])] == []
    rows = [[(row["samples_seen"], row["loss"]) for row in results(folder, "train")] for folder in (one, run)]
    assert rows[0] == rows[1]
    status = read_status(run)
    assert status is not None
    assert (status.state, status.samples_seen, status.restarts) == (FINISHED, 24, 2)


def seen(run: Path) -> int:
    """Samples at the newest record."""
    try:
        return max((row["samples_seen"] for row in results(run, "train")), default=0)
    except (OSError, json.JSONDecodeError):
        return 0

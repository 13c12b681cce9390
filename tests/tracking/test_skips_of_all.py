"""Skipped samples of all processes, over epochs and a restart. Oracle: the sums, by hand; TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from open_clip_ov2.tracking.monitor import RunMonitor, StageInfo
from open_clip_ov2.tracking.sinks import TrackedRun


def monitor_of(run: Path, resumed_at: int | None = None) -> RunMonitor:
    """Of two processes that skip alike."""
    return RunMonitor(
        TrackedRun(run, resumed_at), 0, log_every_n_steps=1, trackers=("tensorboard",),
        console=Console(file=io.StringIO()), gather=lambda counts: {k: 2 * v for k, v in counts.items()},
    )  # fmt: skip


def step(monitor: RunMonitor, samples: int, skipped: dict[str, int]) -> None:
    monitor.step(
        samples, losses={"loss": 1.0}, lr=1.0, grad_norm=None, num_images=8, num_tokens=None, wait_s=0.0, step_s=1.0,
        skipped=skipped,
    )  # fmt: skip


def test_sums_over_processes_epochs_and_a_restart(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path)
    monitor.begin_stage(StageInfo(1, 1, "", 0, 0, 32, 0))
    monitor.start_epoch(0)
    step(monitor, 8, {"bad JSON": 1})
    step(monitor, 16, {"bad JSON": 2})
    monitor.end_epoch({"bad JSON": 6})
    monitor.start_epoch(1)
    step(monitor, 24, {"bad JSON": 1})
    state, in_epoch = monitor.state(), monitor.epoch_skips
    monitor.close()
    again = monitor_of(tmp_path, resumed_at=24)
    again.begin_stage(StageInfo(1, 1, "", 3, 24, 32, 0), state)
    again.start_epoch(1, resumed=True, skips=in_epoch)
    step(again, 32, {"bad JSON": 1})
    assert again.epoch_skips == {"bad JSON": 2}
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("data/skipped/bad JSON")]
    assert found == [(8, 2.0), (16, 6.0), (24, 8.0), (32, 10.0)]

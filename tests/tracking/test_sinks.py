"""Trackers. Oracles: what was written, read back by the json module and by TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import io
import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.monitor import RunMonitor, StageInfo
from open_clip_ov2.tracking.sinks import TRACKERS, JsonLines, TensorBoard, Tracker, tracker_names
from open_clip_ov2.tracking.status import read_status


class Memory(Tracker):
    """The worked example of CONTRIBUTING.md: a tracker that keeps everything in a list."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012 (a tracker of one test)

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None:
        self.calls.append(("open", run_dir, resumed_at))

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        self.calls.append(("stage", number, title, samples_seen))

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        self.calls.append((kind, samples_seen, scalars[f"{kind}/loss"], row["loss"]))

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        self.calls.append(("image", name, image.mode, samples_seen))

    def text(self, name: str, markdown: str, samples_seen: int) -> None:
        self.calls.append(("text", name, markdown.splitlines()[-1], samples_seen))

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self.calls.append(("hparams", dict(values), metrics["val_loss"]))

    def close(self) -> None:
        self.calls.append(("close",))


def silent() -> Console:
    return Console(file=io.StringIO())


def test_a_tracker_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the calls, written out."""
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    trackers = tracker_names("memory,memory")
    monitor = RunMonitor(tmp_path, 0, log_every_n_steps=1, trackers=trackers, resumed_at=8, console=silent())
    with contextlib.closing(monitor):
        monitor.begin_stage(StageInfo(2, 2, "84 px", 0, 2, 8, 8))
        monitor.step(
            16, losses={"loss": torch.tensor(2.0)}, lr=0.1, grad_norm=None, num_images=8, num_tokens=None, wait_s=0.0,
            step_s=1.0, skipped={},
        )  # fmt: skip
        monitor.evaluation(16, 0, {"loss": 1.5})
        monitor.captions(16, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["true"], ["generated"])
        monitor.hparams({"lr": 0.1})
    assert Memory.calls == [
        ("open", tmp_path, 8),
        ("stage", 2, "84 px", 8),
        ("train", 16, 2.0, 2.0),
        ("val", 16, 1.5, 1.5),
        ("image", "val/captions", "RGB", 16),
        ("text", "val/captions_text", "| generated | true |", 16),
        ("hparams", {"lr": 0.1}, 1.5),
        ("close",),
    ]


def test_slow_steps_are_logged_after_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 20 s, of which every hundredth is recorded. Oracle: the lines and records, by hand."""
    clock = [0.0]
    monkeypatch.setattr("open_clip_ov2.tracking.monitor.time.monotonic", lambda: clock[0])
    monitor = RunMonitor(tmp_path, 0, log_every_n_steps=100, console=silent())
    with caplog.at_level("INFO"), contextlib.closing(monitor):
        monitor.begin_stage(StageInfo(1, 1, "", 0, 200, 0, 8))
        for number in range(1, 7):
            clock[0] += 20.0
            monitor.step(
                8 * number, losses={"loss": 7.0 - number}, lr=0.1, grad_norm=None, num_images=8, num_tokens=None,
                wait_s=0.0, step_s=20.0, skipped={},
            )  # fmt: skip
        for batches in (1, 2, 3):
            clock[0] += 10.0
            monitor.still(f"validation: {batches} batches")
    lines = [record.getMessage() for record in caplog.records]
    said = ["samples 8", "samples 24", "samples 40", "validation: 1 batches"]
    assert [line.split(" of")[0] for line in lines] == said
    assert "loss 2 lr 0.1 0.4 images/s" in lines[2]
    assert read(tmp_path) == [(8, 6.0)]
    status = read_status(tmp_path)
    assert status is not None
    assert (status.samples_seen, status.loss) == (40, 2.0)


def test_an_unknown_tracker_is_named() -> None:
    assert tracker_names("") == ()
    with pytest.raises(UserError, match=r"--report-to: unknown tracker 'tensorbord'; did you mean tensorboard\?"):
        tracker_names("tensorbord")


def write(lines: JsonLines, seen: int, loss: float) -> None:
    lines.write("train", seen, {}, {"loss": loss})


def read(run: Path) -> list[tuple[int, float | None]]:
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return [(record["samples_seen"], record["loss"]) for record in records]


def test_a_resumed_run_drops_later_records_and_a_torn_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path)
    for seen in (8, 16, 24):
        write(lines, seen, float("nan") if seen == 8 else float(seen))
    lines.close()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"kind": "tra')
    lines = JsonLines(tmp_path, resumed_at=16)
    write(lines, 24, 1.0)
    lines.close()
    assert read(tmp_path) == [(8, None), (16, 16.0), (24, 1.0)]


def test_a_full_disk_costs_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's own limit on a file's size stands for the disk: it cuts a record short. Oracle: the json module."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = JsonLines(tmp_path)
    write(lines, 8, 1.0)
    size = (tmp_path / "results.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, hard))
        write(lines, 16, 1.0)
        write(lines, 24, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "results.jsonl").stat().st_size == size + 7
    assert "kept until there is room" in caplog.text
    write(lines, 32, 1.0)
    lines.close()
    assert read(tmp_path) == [(8, 1.0), (16, 1.0), (24, 1.0), (32, 1.0)]


def test_hparams_are_in_the_run_itself(tmp_path: Path) -> None:
    """Oracle: TensorBoard's own reader, and one event file, so TensorBoard shows one run."""
    board = TensorBoard(tmp_path)
    board.write("train", 8, {"train/loss": 1.0}, {})
    flags = {"lr": 1e-3, "model": "ov2-vit-nano-8", "seed": 0, "locked": True, "keep_ratio": None}
    board.hparams(flags, {"loss": 1.0})
    board.close()
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()} == {
        **flags,
        "keep_ratio": "None",
    }
    assert [event.value for event in events.Scalars("hparam/loss")] == [1.0]

"""Trackers. Oracles: what was written, read back by the json module and by TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import resource
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from PIL.Image import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.log import setup_logging
from open_clip_ov2.tracking.monitor import RunMonitor, StageInfo
from open_clip_ov2.tracking.sinks import TRACKERS, JsonLines, TensorBoard, TrackedRun, Tracker, WandB, tracker_names
from open_clip_ov2.tracking.status import read_status


class Memory(Tracker):
    """The worked example of CONTRIBUTING.md: a tracker that keeps everything in a list."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012 (a tracker of one test)

    def __init__(self, run: TrackedRun) -> None:
        self.flags = run.flags
        self.calls.append(("open", run.folder, run.resumed_at))

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        self.calls.append(("stage", number, title, samples_seen))

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        self.calls.append((kind, samples_seen, scalars[f"{kind}/loss"], row["loss"]))

    def image(self, name: str, image: Image, samples_seen: int) -> None:
        self.calls.append(("image", name, image.mode, samples_seen))

    def finish(self, metrics: Mapping[str, float]) -> None:
        self.calls.append(("finish", dict(self.flags), metrics["val_loss"]))

    def close(self) -> None:
        self.calls.append(("close",))


def silent() -> Console:
    return Console(file=io.StringIO())


def test_a_tracker_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the calls, written out."""
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    trackers = tracker_names("memory,memory")
    monitor = RunMonitor(
        TrackedRun(tmp_path, 8, {"lr": 0.1}), 0, log_every_n_steps=1, trackers=trackers, console=silent()
    )
    with contextlib.closing(monitor):
        monitor.begin_stage(StageInfo(2, 2, "84 px", 0, 0, 16, 8))
        monitor.step(
            16, losses={"loss": torch.tensor(2.0)}, lr=0.1, grad_norm=None, num_images=8, num_tokens=None, wait_s=0.0,
            step_s=1.0, skipped={},
        )  # fmt: skip
        monitor.evaluation(16, 0, {"loss": 1.5})
        monitor.captions(16, torch.zeros(1, 4, 4, 3, dtype=torch.uint8).numpy(), ["true"], ["generated"])
        monitor.finish()
    assert Memory.calls == [
        ("open", tmp_path, 8),
        ("stage", 2, "84 px", 8),
        ("train", 16, 2.0, 2.0),
        ("val", 16, 1.5, 1.5),
        ("image", "val/captions", "RGB", 16),
        ("finish", {"lr": 0.1}, 1.5),
        ("close",),
    ]


def test_slow_steps_are_logged_after_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 20 s, of which every hundredth is recorded. Oracle: the lines and records, by hand."""
    clock = [0.0]
    monkeypatch.setattr("open_clip_ov2.tracking.monitor.time.monotonic", lambda: clock[0])
    monitor = RunMonitor(TrackedRun(tmp_path), 0, log_every_n_steps=100, console=silent())
    with caplog.at_level("INFO"), contextlib.closing(monitor):
        monitor.begin_stage(StageInfo(1, 1, "", 0, 0, 1600, 0))
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
    lines = JsonLines(TrackedRun(tmp_path))
    for seen in (8, 16, 24):
        write(lines, seen, float("nan") if seen == 8 else float(seen))
    lines.close()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"kind": "tra')
    lines = JsonLines(TrackedRun(tmp_path, 16))
    write(lines, 24, 1.0)
    lines.close()
    assert read(tmp_path) == [(8, None), (16, 16.0), (24, 1.0)]


def test_a_full_disk_costs_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's own limit on a file's size stands for the disk: it cuts a record short. Oracle: the json module."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lines = JsonLines(TrackedRun(tmp_path))
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
    flags = {"lr": 1e-3, "model": "ov2-vit-nano-8", "seed": 0, "locked": True, "keep_ratio": None}
    board = TensorBoard(TrackedRun(tmp_path, flags=flags))
    board.write("train", 8, {"train/loss": 1.0}, {})
    board.finish({"loss": 1.0})
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


def sent_to_wandb(folder: Path) -> list[Any]:
    """All records of the offline run folders, in order, as wandb's own protocol reads them.

    A .wandb file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, of pieces with checksum, length and
    type (1 a whole record, 2 its beginning, 3 its middle, 4 its end).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                records.append(Record.FromString(record))
                record = b""
    return records


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process was killed after 16 samples, and the second resumes from 8. Oracle: wandb's own protocol."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed_at, logged in ((None, (8, 16)), (8, (16, 24))):
        tracker = WandB(TrackedRun(tmp_path, resumed_at, {"lr": 0.1}, "pictures", "a note"))
        for seen in logged:
            tracker.write("train", seen, {"train/loss": float(seen)}, {})
        tracker.image("val/captions", PIL.Image.new("RGB", (4, 4)), logged[-1])
        tracker.finish({"loss": 2.0})
        tracker.close()
    wandb.teardown()  # its service writes in the background
    records = sent_to_wandb(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.project, run.notes) for run in runs} == {(runs[0].run_id, "pictures", "a note")}
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [(row["samples_seen"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(8, 8.0), (16, 16.0), (24, 24.0)]
    assert [row["samples_seen"] for row in rows if "val/captions/path" in row] == [16, 24]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/val/*.png"))) == 2


def test_trackio_keeps_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: trackio's own database. The package is not among the tests' own, because it holds Pillow back."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    code = (
        "from pathlib import Path\nfrom PIL import Image\n"
        "from open_clip_ov2.tracking.sinks import TrackedRun, Trackio\n"
        f"tracker = Trackio(TrackedRun(Path({str(tmp_path)!r}) / 'run', None, {{'lr': 0.1}}, 'pictures'))\n"
        "tracker.write('train', 8, {'train/loss': 2.0}, {})\n"
        "tracker.image('val/captions', Image.new('RGB', (4, 4)), 8)\ntracker.close()\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "print(SQLiteStorage.get_logs('pictures', 'run'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'train/loss': 2.0" in done.stdout
    assert "'step': 8" in done.stdout


def test_a_name_that_is_not_utf8_is_in_the_log(tmp_path: Path) -> None:
    """Oracle: the line; before, logging printed a traceback in its place."""
    with setup_logging(tmp_path / "out.log", 0, None):
        logging.getLogger("open_clip_ov2").warning("skipped %s", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (tmp_path / "out.log").read_text().rstrip().endswith(r"skipped caf\udce9")

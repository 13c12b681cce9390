"""status.json. Oracles: the json module, a reader next to a writer, what was raised."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import pytest

from open_clip_ov2.errors import Interrupted, RunFailed
from open_clip_ov2.tracking.status import Status, StatusFile, job_id, read_status, write_status


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    """Oracle: json.loads of what is there while another thread writes."""
    write_status(tmp_path, Status("running", reason="x" * 10_000))
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            write_status(tmp_path, Status("running", samples_seen=number, reason="x" * (10_000 + number)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        values = json.loads((tmp_path / "status.json").read_text())
        assert len(values["reason"]) == 10_000 + values["samples_seen"]
        assert values["samples_seen"] >= seen
        seen = values["samples_seen"]
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (Interrupted("SIGUSR2: saved"), "interrupted", "SIGUSR2: saved"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (RunFailed("NaN\nin two lines"), "failed", "NaN"),
        (MemoryError(), "failed", "MemoryError"),
    ],
)
def test_how_a_run_ends_is_its_state(tmp_path: Path, error: BaseException | None, state: str, reason: str) -> None:
    file = StatusFile(tmp_path)
    file.update(stage=1, stages=2, samples_seen=8, loss=float("nan"))
    with contextlib.suppress(type(error)) if error else contextlib.nullcontext(), file.outcome():
        if error is not None:
            raise error
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason, status.loss, status.samples_seen) == (state, reason, None, 8)


def test_restarts_are_counted(tmp_path: Path) -> None:
    """A run that stopped after a stage, as asked, and continues was not restarted."""
    for expected, end in enumerate(("interrupted", "failed", "running")):
        StatusFile(tmp_path).update(state=end)
        assert read_status(tmp_path).restarts == expected  # type: ignore[union-attr]
    StatusFile(tmp_path).update(state="finished")
    StatusFile(tmp_path)
    assert read_status(tmp_path).restarts == 3  # type: ignore[union-attr]


def test_other_ranks_and_full_disks(tmp_path: Path) -> None:
    StatusFile(tmp_path, active=False).update(samples_seen=1)
    assert list(tmp_path.iterdir()) == []
    file = StatusFile(tmp_path / "run")
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").touch()  # no folder any more: writing fails, the run continues
    file.update(samples_seen=1)
    assert read_status(tmp_path / "run") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples_seen": 1}', "null"])
def test_what_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_job_ids() -> None:
    """As SLURM and submitit name them."""
    assert job_id({}) == ""
    assert job_id({"SLURM_JOB_ID": "17"}) == "17"
    assert job_id({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}) == "17_2"
    assert job_id({"SUBMITIT_LOCAL_JOB_ID": "4711"}) == "4711"

"""A run's folder copied in the background. Oracles: the files themselves, and the clock."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from open_clip_ov2.errors import UserError
from open_clip_ov2.train import remote_sync
from open_clip_ov2.train.checkpoint import CheckpointName
from open_clip_ov2.train.remote_sync import RemoteSync


def wait_until(condition: Any, timeout_s: float = 20) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def test_what_changes_is_copied_and_a_store_that_comes_back_gets_the_rest(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that a file takes the place of for a while."""
    remote, away = tmp_path / "remote", tmp_path / "away"
    sync = RemoteSync(run, str(remote), 0.05)
    sync.start("run.json")
    (run / "results.jsonl").write_text("1\n")
    (run / ".tmp-status.json").write_text("half")
    (run / ".lock").touch()
    (run / "checkpoints" / "epoch_latest.pt").symlink_to("stage_1.pt")
    wait_until(lambda: (remote / "results.jsonl").exists())
    remote.rename(away)
    remote.touch()
    (run / "results.jsonl").write_text("1\n2\n")
    wait_until(lambda: sync.failures >= 2)
    assert "REMOTE SYNC FAILED: results.jsonl" in caplog.text
    remote.unlink()
    away.rename(remote)
    wait_until(lambda: (remote / "results.jsonl").read_text() == "1\n2\n")
    (run / "checkpoints" / "stage_1.pt").write_bytes(b"whole")
    sync.close()
    found = {str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()}
    assert found == {"run.json", "results.jsonl", "checkpoints/stage_1.pt"}


class Hanging(MemoryFileSystem):
    """A store that takes no checkpoint until it is told to."""

    protocol = "memory"
    store: ClassVar[dict[str, Any]] = {}
    go_on = threading.Event()

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if lpath.endswith(".pt"):
            self.go_on.wait()
        super().put_file(lpath, rpath, **kwargs)


def test_a_store_that_hangs_holds_up_neither_a_step_nor_the_end(
    run: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is what happens here between start and close; records are there before the checkpoint."""
    fsspec.register_implementation("memory", Hanging, clobber=True)
    request.addfinalizer(lambda: fsspec.register_implementation("memory", MemoryFileSystem, clobber=True))
    caplog.set_level(logging.INFO)
    sync = RemoteSync(run, "memory://bucket/run", 0.01)
    # Both before the first pass: one that saw the checkpoint alone would hang with it.
    (run / "checkpoints" / "stage_1_samples_8.pt").write_bytes(b"large")
    (run / "results.jsonl").write_text("1\n")
    begin = time.monotonic()
    sync.start("run.json")
    wait_until(lambda: "/bucket/run/results.jsonl" in Hanging.store)
    sync.within_s = 0.2
    sync.close()
    assert time.monotonic() - begin < 20
    assert "REMOTE SYNC: not all is in memory://bucket/run after 0.2 s" in caplog.text
    Hanging.go_on.set()
    wait_until(lambda: "/bucket/run/checkpoints/stage_1_samples_8.pt" in Hanging.store)


def test_a_run_is_fetched_once_with_its_newest_checkpoint_alone(run: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    for name in ("stage_1.pt", "stage_2_samples_8.pt", "stage_1_samples_99.pt", "best.json", "replaced-x/stage_3.pt"):
        (run / "checkpoints" / name).parent.mkdir(exist_ok=True)
        (run / "checkpoints" / name).write_text(name)
    (run / "submit").mkdir()
    (run / "submit" / "log").write_text("there")
    (run / "results.jsonl").write_text("now")
    sync = RemoteSync(run, f"file://{remote}", 1)
    assert sync.fetch("run.json", (), True) == ""  # it is here
    sync.start("run.json")
    sync.close()
    new = tmp_path / "new"
    (new / "submit").mkdir(parents=True)
    (new / "submit" / "log").write_text("here")
    (new / "results.jsonl").write_text("from an earlier fetch")
    with pytest.raises(UserError, match="this is a training run; give its validation another --name"):
        RemoteSync(new, str(remote), 1).fetch("run.json", ("submit",), False)
    assert "fetched 4 files" in RemoteSync(new, str(remote), 1).fetch("run.json", ("submit",), True)
    assert (new / "results.jsonl").read_text() == "now"
    assert {path.name for path in (new / "checkpoints").iterdir()} == {"stage_2_samples_8.pt", "best.json"}
    assert (new / "submit" / "log").read_text() == "here"
    assert RemoteSync(tmp_path / "other", str(tmp_path / "nowhere"), 1).fetch("run.json", (), True) == ""
    (tmp_path / "nowhere").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RemoteSync(run, str(tmp_path / "nowhere" / "run"), 1).start("run.json")


@pytest.mark.parametrize("store", ["memory://branches", "file://{tmp_path}/remote"])
def test_a_copy_that_is_ahead_is_not_overwritten_and_one_of_another_branch_is_set_aside(
    run: Path, tmp_path: Path, store: str
) -> None:
    """A folder that is older than its copy; then `--resume FILE`. Oracle: the names there."""
    address, checkpoints = store.format(tmp_path=tmp_path), run / "checkpoints"
    for name in ("stage_1_samples_8.pt", "stage_1_samples_16.pt", "stage_1_samples_24.pt", "best.json"):
        (checkpoints / name).write_text(name)
    sync = RemoteSync(run, address, 1)
    sync.start("run.json")
    sync.close()
    sync.check_newest()
    (checkpoints / "stage_1_samples_24.pt").unlink()
    (checkpoints / "best.json").unlink()
    with pytest.raises(
        UserError, match=r"_samples_16\.pt, and its copy in .* has stage_1_samples_24\.pt: the run went on"
    ):
        sync.check_newest()
    begin = CheckpointName(1, False, 16)
    sync.set_aside(begin, "replaced-x")
    fs, path = fsspec.url_to_fs(address)
    there = {name[len(path) + 1 :] for name in fs.find(f"{path}/checkpoints")}
    assert there == {
        "checkpoints/stage_1_samples_8.pt", "checkpoints/stage_1_samples_16.pt",
        "checkpoints/replaced-x/stage_1_samples_16.pt",
        "checkpoints/replaced-x/stage_1_samples_24.pt", "checkpoints/replaced-x/best.json",
    }  # fmt: skip
    sync.check_newest()


def test_a_signal_during_the_last_copy_ends_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that never answers. Oracle: the clock."""
    fsspec.register_implementation("memory", Hanging, clobber=True)
    request.addfinalizer(lambda: fsspec.register_implementation("memory", MemoryFileSystem, clobber=True))
    request.addfinalizer(Hanging.go_on.set)
    monkeypatch.setattr(remote_sync, "ON_SIGNAL_S", 0.1)
    Hanging.go_on.clear()
    sync = RemoteSync(run, "memory://bucket/signalled", 60, lambda: True)
    (run / "checkpoints" / "stage_1.pt").write_bytes(b"large")
    begin = time.monotonic()
    sync.start("run.json")
    sync.close()
    assert time.monotonic() - begin < 30
    assert "REMOTE SYNC: not all is in memory://bucket/signalled" in caplog.text

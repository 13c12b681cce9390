"""Two processes in one folder. Oracle: real processes, killed, frozen and started at once, and the files themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from training import _SERVER, TINY_MODEL, Rank, data_flags, finish, results, start_ranks, wait_for

from open_clip_ov2 import locks
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.errors import InUse
from open_clip_ov2.files import write_json
from open_clip_ov2.locks import LOCK, FolderLock, Owner, job_id
from open_clip_ov2.train.checkpoint import list_checkpoints

BEAT_S = 0.2  # a lock without a touch for 12 beats is a dead process's
JOB = {"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "here"}


def hold(folder: Path) -> int:
    """Until it is killed, or another process has the folder."""
    with FolderLock(folder, BEAT_S) as lock:
        while True:
            try:
                lock.check()
            except InUse as error:
                (folder / "ended").write_text(str(error))
                return 2
            time.sleep(0.01)


STARTED: list[Rank] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    for rank in STARTED:
        if rank.poll() is None:
            rank.send_signal(signal.SIGKILL)
    STARTED.clear()


def started(work: Callable[..., int], args: Sequence[Any], environment: dict[str, str]) -> Rank:
    STARTED.append(Rank(work, args, environment))
    return STARTED[-1]


def holder(folder: Path, **environment: str) -> Rank:
    rank = started(hold, [folder], environment)
    assert wait_for(lambda: (folder / LOCK).exists() and (folder / LOCK).stat().st_size > 0, [rank])
    return rank


def change(folder: Path, **values: Any) -> None:
    """Rewrite what the lock says of its owner, who does not notice."""
    write_json(folder / LOCK, json.loads((folder / LOCK).read_text()) | values)


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """The lock of a killed process."""
    rank = holder(tmp_path / "dead")
    rank.send_signal(signal.SIGKILL)
    assert wait_for(lambda: rank.poll() is not None, [])
    return tmp_path / "dead" / LOCK


def contend(folders: list[Path], start: Barrier, tried: Barrier, out: Path) -> int:
    """Try to take each folder at the same moment as the others, and keep it until all have tried."""
    for folder in folders:
        start.wait(60)
        try:
            with FolderLock(folder, BEAT_S):
                (out / f"{folder.name} {os.getpid()}").write_text("won")
                tried.wait(60)
        except InUse as error:
            (out / f"{folder.name} {os.getpid()}").write_text(str(error))
            tried.wait(60)
    return 0


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path: Path, dead: Path) -> None:
    """Into a new folder; into one that a dead process has left; into one whose heir was killed as it took over."""
    count, folders = 5, [tmp_path / str(number) for number in range(24)]
    token = json.loads(dead.read_text())["token"]
    for number, folder in enumerate(folders):
        if number % 3:
            folder.mkdir()
            shutil.copy(dead, folder / LOCK)
        if number % 3 == 2:
            write_json(folder / f"{LOCK}.{token}", json.loads(dead.read_text()) | {"token": "heir"})
    out = tmp_path / "out"
    out.mkdir()
    barriers = [_SERVER.Barrier(count), _SERVER.Barrier(count)]
    ranks = start_ranks(contend, [folders, *barriers, out], count)
    assert [status for status, _ in finish(ranks)] == [0] * count
    for folder in folders:
        said = {path.name.split()[1]: path.read_text() for path in out.glob(f"{folder.name} *")}
        winners = [pid for pid, text in said.items() if text == "won"]
        assert len(said) == count
        assert len(winners) == 1
        assert all(f"process {winners[0]} on" in text for pid, text in said.items() if pid not in winners)
        assert os.listdir(folder) == []


def test_a_takeover_is_waited_for(tmp_path: Path, dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is about to replace a dead owner, and gives up; then one that hangs. Oracle: who gets the folder,
    and whom the error names."""
    shutil.copy(dead, tmp_path / LOCK)
    claim = tmp_path / f"{LOCK}.{json.loads(dead.read_text())['token']}"
    write_json(claim, asdict(Owner()))
    threading.Timer(0.2, claim.unlink).start()
    with FolderLock(tmp_path):
        assert not claim.exists()
    shutil.copy(dead, tmp_path / LOCK)
    write_json(claim, asdict(Owner()))
    monkeypatch.setattr(locks, "TAKEOVER_S", 0.1)
    with pytest.raises(InUse, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).__enter__()


def test_a_living_owner_is_told_from_a_dead_one(tmp_path: Path, dead: Path) -> None:
    rank = holder(tmp_path)
    rank.send_signal(signal.SIGSTOP)  # it gives no sign, and lives
    said = rf"process {rank.pid} on .* since \d{{4}}-.*; wait until it ends, stop it, or name another folder"
    with pytest.raises(InUse, match=said):
        FolderLock(tmp_path).__enter__()
    change(tmp_path, start="1")  # its number was another process's
    with FolderLock(tmp_path):
        pass
    shutil.copy(dead, tmp_path / LOCK)
    with FolderLock(tmp_path), pytest.raises(InUse, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).__enter__()
    assert not (tmp_path / LOCK).exists()
    rank.send_signal(signal.SIGKILL)


def test_on_another_machine_it_lives_while_it_touches_the_file(tmp_path: Path) -> None:
    """What the process says of its machine is changed; it runs, and is killed, here."""
    rank = holder(tmp_path)
    change(tmp_path, machine="another", host="node07")
    with pytest.raises(InUse, match=f"process {rank.pid} on node07"):
        FolderLock(tmp_path).__enter__()
    rank.send_signal(signal.SIGKILL)
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}])
def test_a_requeued_job_takes_its_folder_at_once(
    tmp_path: Path, array: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the process of before, on another machine, seems to live; that one stops when it sees it."""
    rank = holder(tmp_path, **JOB, **array)
    change(tmp_path, machine="another")
    for name, value in {**JOB, **array}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InUse, match=rf"\(job {job_id()}\)"):
        FolderLock(tmp_path).__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "elsewhere")
    with pytest.raises(InUse):
        FolderLock(tmp_path).__enter__()
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    with FolderLock(tmp_path):
        assert rank.finish(60)[0] == 2
        assert f"process {os.getpid()} on" in (tmp_path / "ended").read_text()


def train_here(*flags: str) -> int:
    return ov2(["train", *flags])


def flags_of(squares: Path, vocabulary: Path, logs: Path, samples: int) -> list[str]:
    more = ["--logs", str(logs), "--name", "run", "--log-every-n-steps", "1", "--model", TINY_MODEL]
    more += ["--force-context-length", "12", "--force-image-size", "16", "--tokenizer", str(vocabulary)]
    return [*data_flags(squares, samples), *more]


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_the_second_train_says_who_is_there_and_touches_nothing(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks share one lock. They stand still while the second command comes; then they go on to their end."""
    flags, run = flags_of(squares, vocabulary, tmp_path, 64), tmp_path / "run"
    ranks = start_ranks(train_here, [*flags, "--batch-size", "4", "--save-every-steps", "1"], 2)
    STARTED.extend(ranks)
    assert wait_for(lambda: len(list_checkpoints(run / "checkpoints")) > 0, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    (run / "checkpoints" / ".tmp-stage_1.pt").write_bytes(b"half written")
    before = state_of(run)
    assert ov2(["train", *flags]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"ov2: error: {run}: process {ranks[0].pid} on ")
    assert state_of(run) == before
    assert ov2(["eval", str(run), "--data", f"{squares}/val/00000.tar", "--tasks", "caption-loss"]) == 0
    assert ov2(["plot", str(run), "--out", str(tmp_path / "curves.png")]) == 0
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    assert [status for status, _ in finish(ranks)] == [0, 0]
    assert [row["samples_seen"] for row in results(run, "train")] == [8 * step for step in range(1, 9)]
    assert not (run / LOCK).exists()
    assert ov2(["train", *flags]) == 0
    assert "nothing left to do" in (run / "out.log").read_text()


def test_a_job_that_was_requeued_elsewhere_stops_where_it_was(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """A node that was given up for lost. Oracle: the files after its end are those of the requeued job."""
    flags, run = [*flags_of(squares, vocabulary, tmp_path, 400_000), "--save-every-steps", "20"], tmp_path / "run"
    lost = started(train_here, flags, JOB)
    assert wait_for(lambda: len(list_checkpoints(run / "checkpoints")) > 0, [lost])
    change(run, machine="another")
    requeued = started(train_here, flags, {**JOB, "SLURM_RESTART_COUNT": "1"})
    status, error = lost.finish(60)
    assert status == 2
    assert error.strip().splitlines()[-1].startswith(f"ov2: error: {run}: process {requeued.pid} on ")
    assert wait_for(lambda: json.loads((run / "status.json").read_text())["pid"] == requeued.pid, [requeued])
    requeued.send_signal(signal.SIGTERM)
    assert requeued.finish(60)[0] == 75

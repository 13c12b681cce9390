"""Checkpoints on disk. Oracles: the files themselves, a file system that is really full, a process really killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "openclip"))
from training import finish, start_ranks, wait_for

from open_clip_ov2.errors import UserError
from open_clip_ov2.train.checkpoint import (
    RESUME_KEY,
    CheckpointName,
    CheckpointWriter,
    list_checkpoints,
    newest_readable,
    read_best,
    snapshot,
)


def content(value: float, size: int = 10) -> dict[str, object]:
    return {"state_dict": {"w": torch.full((size,), value)}, RESUME_KEY: {"samples_seen": int(value)}}


def save(writer: CheckpointWriter, samples: int, metric: float | None = None, size: int = 10) -> None:
    writer.save(CheckpointName(1, False, samples), content(float(samples), size), metric)
    writer.wait()


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(0, 10**13)), unique=True))
def test_names_are_read_back_in_the_order_of_training(parts: list[tuple[int, bool, int]]) -> None:
    """Oracle: tuples' own order; a stage's end comes after all its samples, and has no number of them."""
    names = [CheckpointName(stage, done, 0 if done else samples) for stage, done, samples in parts]
    assert sorted(CheckpointName.of(name.file) for name in names) == sorted(names)  # type: ignore[type-var]
    assert CheckpointName(1, False, 10**12) < CheckpointName(1, True, 0) < CheckpointName(2, False, 0)


@pytest.mark.parametrize("name", ["epoch_1.pt", "stage_1.pt.tmp", ".tmp-stage_1.pt", "stage_x.pt", "best.json"])
def test_other_files_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == []


def test_the_last_few_the_best_and_the_ends_of_stages_stay(tmp_path: Path) -> None:
    """Oracle: the rule, written out."""
    writer = CheckpointWriter(tmp_path, keep=2)
    for samples, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, None)):
        save(writer, samples, loss)
    writer.save(CheckpointName(1, True, 0), content(60.0))
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "stage_1_samples_20.pt", "stage_1_samples_40.pt", "stage_1_samples_50.pt", "stage_1.pt",
    ]  # fmt: skip
    assert read_best(tmp_path) == ("stage_1_samples_20.pt", 1.0)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_damaged_later_one_does_not_cost_the_whole_one(tmp_path: Path, keep: int) -> None:
    """A run that passed over a damaged checkpoint and went on. Oracle: what was written last can be read."""
    writer = CheckpointWriter(tmp_path, keep=keep)
    save(writer, 80)
    (tmp_path / "stage_1_samples_90.pt").write_bytes(b"torn")
    save(writer, 85)
    found = newest_readable(list_checkpoints(tmp_path))
    assert found is not None
    assert found[0].name == "stage_1_samples_85.pt"


def test_a_later_step_does_not_change_what_is_being_saved(tmp_path: Path) -> None:
    weight = torch.zeros(1_000_000)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(CheckpointName(1, False, 1), {"state_dict": {"w": weight}, RESUME_KEY: {}})
    weight += 1
    writer.wait()
    found = newest_readable(list_checkpoints(tmp_path))
    assert found is not None
    assert not found[1]["state_dict"]["w"].any()
    nested = {"a": [weight, (weight, 3)], "b": "text"}
    copied = snapshot(nested)
    assert copied["a"][0].data_ptr() != weight.data_ptr()
    assert (type(copied["a"][1]), copied["a"][1][1], copied["b"]) == (tuple, 3, "text")


def test_damaged_files_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)
    for samples in (1, 2, 3):
        save(writer, samples)
    newest = tmp_path / "stage_1_samples_3.pt"
    newest.write_bytes(newest.read_bytes()[:-50])
    (tmp_path / "stage_1_samples_4.pt").write_bytes(b"")
    torch.save({"state_dict": {}}, tmp_path / "stage_1_samples_5.pt")  # somebody's own file
    found = newest_readable(list_checkpoints(tmp_path))
    assert found is not None
    assert found[0].name == "stage_1_samples_2.pt"
    assert [word for word in ("_3.pt", "_4.pt", "_5.pt") if word in caplog.text] == ["_3.pt", "_4.pt", "_5.pt"]
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of 5 checkpoints can be read"):
        newest_readable(list_checkpoints(tmp_path))
    assert newest_readable(list_checkpoints(tmp_path / "nowhere")) is None


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a pickle whose loading would make a file."""
    monkeypatch.chdir(tmp_path)
    torch.save({RESUME_KEY: Evil()}, tmp_path / "stage_1.pt")
    with pytest.raises(UserError):
        newest_readable(list_checkpoints(tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_loud_and_costs_no_checkpoint(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(small_disk, keep=1)
    save(writer, 1, size=100_000)  # 0.4 MB
    save(writer, 2, size=200_000)  # beside it there is no room for 0.8 MB
    assert writer.failure
    assert "CHECKPOINT NOT WRITTEN" in caplog.text
    assert "No space left on device" in caplog.text
    assert "Free some space." in caplog.text
    found = newest_readable(list_checkpoints(small_disk))
    assert found is not None
    assert found[1]["state_dict"]["w"].sum() == 100_000
    assert sorted(os.listdir(small_disk)) == ["stage_1_samples_1.pt"]
    save(writer, 3, size=50_000)
    assert [path.name for path in list_checkpoints(small_disk)] == ["stage_1_samples_3.pt"]


def test_another_failure_is_loud_too_and_says_nothing_of_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is gone."""
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1)
    (tmp_path / "checkpoints").rmdir()
    save(writer, 1)
    assert writer.failure
    assert "CHECKPOINT NOT WRITTEN" in caplog.text
    assert "No such file or directory" in caplog.text
    assert "space" not in caplog.text


def _save_for_ever(folder: str, first: int) -> int:
    writer = CheckpointWriter(Path(folder), keep=2)
    for n in itertools.count(first):
        content = {"state_dict": {"w": torch.full((300_000,), float(n))}, RESUME_KEY: {"n": n}}
        writer.save(CheckpointName(1, False, n), content)
    return 0


def _newest(folder: Path) -> int:
    return max((CheckpointName.of(path.name).samples_seen for path in list_checkpoints(folder)), default=0)


def test_killed_while_writing_the_newest_is_whole(tmp_path: Path) -> None:
    """Oracle: each file's tensor is full of its own number; the process is killed at odd moments."""
    for first, delay_s in ((1000, 0.05), (2000, 0.11), (3000, 0.23)):
        ranks = start_ranks(_save_for_ever, [str(tmp_path), first], 1)
        assert wait_for(lambda first=first: _newest(tmp_path) >= first, ranks)
        time.sleep(delay_s)
        ranks[0].send_signal(signal.SIGKILL)
        assert finish(ranks)[0][0] == -signal.SIGKILL
        files = list_checkpoints(tmp_path)
        assert files
        for path in files:
            loaded = torch.load(path, weights_only=True)
            assert (loaded["state_dict"]["w"] == loaded[RESUME_KEY]["n"]).all()
    CheckpointWriter(tmp_path, keep=1)
    assert not list(tmp_path.glob(".tmp-*"))

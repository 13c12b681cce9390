"""A submission that version 0.1.0 wrote before its modules were renamed. Oracle: the files in old_submission/."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from open_clip_ov2.cli import main
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.ends import main as check_exit
from open_clip_ov2.launch.ends import read_errors, record_error, record_loss
from open_clip_ov2.launch.folder import DEBUG, submissions
from open_clip_ov2.launch.submit import submit

FILES = Path(__file__).parent / "old_submission"
REASON = "RunFailed: 2 steps in a row had a non-finite loss"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run's folder, at the place that request.json names."""
    folder = tmp_path / "logs" / "run"
    shutil.copytree(FILES, folder / "submit" / "001")
    shutil.move(folder / "submit" / "001" / "status.json", folder)
    request = folder / "submit" / "001" / "request.json"
    request.write_text(request.read_text().replace("/place", str(tmp_path)))
    return folder


def test_it_is_listed(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run.parents[1])
    monkeypatch.setenv("PATH", str(run))  # no SLURM there
    assert main(["jobs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["run_dir"], row["job_id"]) == ("run", str(run), "17")
    assert (row["state"], row["reason"]) == ("failed", REASON)
    assert row["status"] == json.loads((run / "status.json").read_text())
    assert main(["jobs"]) == 0
    assert f"run: failed: {REASON}" in capsys.readouterr().out
    by_hand = shutil.copytree(run, run.with_name("a[b]"), ignore=shutil.ignore_patterns("submit"))
    monkeypatch.chdir(run.parent)  # the same folder by two names is one
    assert main(["jobs", "--logs", "../logs", "--logs", ".", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run_dir"] for row in rows] == [str(run), str(by_hand)]
    assert main(["jobs", "../logs"]) == 0
    assert "a[b]" in capsys.readouterr().out
    assert main(["jobs", "cancel", "../logs/run"]) == 2
    assert "nothing to cancel" in capsys.readouterr().err


def test_its_request_and_exits_are_read(run: Path) -> None:
    (submission,) = submissions(run)
    request = submission.request()
    assert request.clusters == (ClusterOptions(nodes=2, setup=("module load cuda",), environment={"A": "1"}),)
    assert request.members[0].argv == ("--model", "ov2-vit-nano-8", "--name", "run")
    assert request.members[0].varied == {"lr": 0.1}
    assert [error["reason"] for error in read_errors(submission.exits, "17", 1)] == [REASON]
    assert record_loss(submission.exits, 0, "stage_1_samples_16.pt") == ["stage_1_samples_8.pt"]


def test_a_job_that_found_the_folder_in_use_leaves_the_runs_state(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the run's files before and after; the reason printed is that of the rank that found it in use."""
    (submission,) = submissions(run)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    record_error(submission.exits, 1, "a lost peer")
    record_error(submission.exits, 0, "process 7 on node07 ...", in_use=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert check_exit(submission.folder, 2) == 2
    assert capsys.readouterr().out == "ov2: process 7 on node07 ...\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_submission_that_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """Its recipe is a folder. Oracle: the folder before."""
    (submission,) = submissions(run)
    request = submission.request()
    (spec,) = request.members
    broken = replace(spec, argv=(*spec.argv, "--recipe", str(tmp_path)))
    with pytest.raises(OSError, match="directory"):
        submit(run, replace(request, executor=DEBUG, members=(broken,)))
    assert [path.name for path in (run / "submit").iterdir()] == ["001"]

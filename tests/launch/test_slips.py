"""Mistakes of a user before a submission. Oracle: exit status 2, one line, no folder left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from open_clip_ov2.cli import main
from open_clip_ov2.tracking.status import Status, write_status

NANO = ["--model", "ov2-vit-nano-8", "--force-image-size", "24", "--train-num-samples", "32"]
SLIPS = {  # before `--`, after it, what the line says
    "unknown flag of the trainer": ([], ["--keep-ration", "0.5"], "--keep-ration"),
    "unknown flag of the cluster": (["--node", "2"], [], "ov2 submit: unrecognized arguments: --node"),
    "shards that do not exist": ([], ["--train-data", "nowhere-{0..3}.tar"], "4 of 4 shards do not exist"),
    "no such model": ([], ["--model", "ov2-vit-l-15"], "did you mean ov2-vit-l-14"),
    "no recipe": ([], ["--recipe", "nowhere.toml"], "nowhere.toml"),
    "bad time": (["--time", "soon"], [], "1-12:00:00"),
    "bad nodes": (["--nodes", "0"], [], "expected an integer >= 1"),
    "several nodes, one job": (["--nodes", "1,2"], [], "--stage-jobs"),
    "no such cluster file": (["--cluster", "nowhere.toml"], [], "nowhere.toml: cannot be read"),
    "local and debug": (["--local", "1", "--debug"], [], "not allowed with"),
    "no processes": (["--local", "0"], [], "expected at least one process"),
    "stages as jobs without SLURM": (["--local", "1", "--stage-jobs"], [], "--stage-jobs needs SLURM"),
    "does not fit": (["--gpus-per-node", "1", "--gpu-memory-gb", "0.1"], ["--batch-size", "512"], "needs about"),
    "no SLURM": ([], [], "no SLURM on this machine"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line(
    slip: str, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, expected = SLIPS[slip]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    flags = [*NANO, "--train-data", f"{squares}/train/{{00000..00003}}.tar", *after]
    assert main(["submit", *before, "--", *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("ov2: error: ")
    assert expected in err
    assert "\n" not in err
    assert list(tmp_path.iterdir()) == []


def test_nothing_after_the_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--nodes", "2"]) == 2
    assert "-- --model" in capsys.readouterr().err


def test_a_dry_run_shows_all_and_writes_nothing(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without SLURM. Oracle: the text, the empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ov2-cluster.toml").write_text('partition = "train"\n')
    flags = [*NANO[:2], "--train-data", f"{squares}/train/00000.tar", "--dataset-resampled"]
    stages = ["--stage", "16:samples=64,lr=1e-3", "--stage", "24:samples=32,lr=1e-4", "--global-batch", "8"]
    shape = ["--nodes", "1,2", "--gpus-per-node", "2", "--time", "2h,1h", "--stage-jobs"]
    assert main(["submit", "--dry-run", *shape, "--", *flags, *stages]) == 0
    out = capsys.readouterr().out
    for text in (
        "ov2-cluster.toml", "96 samples", "stage 2: 2 nodes, 4 processes, 2 GPUs per node, partition train, 1 h 00 min",
        "--- sbatch.stage-2.sh", "#SBATCH --dependency=afterok:STAGE_1", "#SBATCH --gpus-per-node=2",
    ):  # fmt: skip
        assert text in out
    assert [path.name for path in tmp_path.iterdir()] == ["ov2-cluster.toml"]


def test_a_dry_run_of_a_sweep_shows_one_array(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: sbatch's own flag for an array, with the number that run at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr.toml").write_text("[grid]\nlr = [1e-3, 1e-4, 1e-5]\n")
    flags = [*NANO, "--train-data", f"{squares}/train/00000.tar", "--dataset-resampled"]
    assert main(["sweep", "lr.toml", "--dry-run", "--max-running", "2", "--", *flags]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("run ")] == [
        "lr-0.001:", "lr-0.0001:", "lr-1e-05:",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["lr.toml"]


def test_jobs_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jobs"]) == 0
    assert "no runs in logs" in capsys.readouterr().out
    for words in (["jobs", "nowhere"], ["jobs", "--logs", "nowhere"], ["jobs", "cancle"]):
        assert main(words) == 2
        assert f"{words[-1]}: no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["jobs", "empty"]) == 0
    assert "no runs in empty" in capsys.readouterr().out
    assert main(["jobs", "logs", "x"]) == 2
    assert "x: no submitted run" in capsys.readouterr().err
    assert main(["jobs", "cancel"]) == 2
    assert "RUN is missing" in capsys.readouterr().err
    assert main(["sweep", "nowhere.toml"]) == 2
    assert "nowhere.toml: cannot be read" in capsys.readouterr().err


def test_jobs_of_a_folder_shows_runs_that_nobody_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run, of a folder of runs, and of one above it, as a sweep has them. Oracle: what the runs have recorded."""
    monkeypatch.chdir(tmp_path)
    for name, told in (("one", Status("finished", 1, 1, 48, 48, loss=1.25)), ("two", Status("failed", reason="NaN"))):
        write_status(tmp_path / "logs" / name, told)
    assert main(["jobs", str(tmp_path / "logs" / "one")]) == 0
    out = capsys.readouterr().out
    assert "48 / 48" in out
    assert "1.250" in out
    for words in ([], ["logs"], [str(tmp_path)]):
        assert main(["jobs", *words]) == 0
        out = capsys.readouterr().out
        assert "finished" in out
        assert "two: failed: NaN" in out
    assert main(["jobs", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [one["status"]["state"] for one in rows] == ["finished", "failed"]
    assert [one["state"] for one in rows] == ["finished", "failed"]  # where submitted runs have it

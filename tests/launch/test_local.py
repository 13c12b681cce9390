"""`ov2 submit --local` in a process of its own, as a user runs it. Oracle: the pipe, the files, `ov2 jobs`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_clip_ov2.cli import main
from open_clip_ov2.launch import state as state_of


def ov2(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "open_clip_ov2", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_a_local_run_is_left_alone_cancelled_and_resubmitted(
    squares: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes. The command returns and closes its pipe while the run continues; a cancelled run saves first."""
    data = ["--train-data", f"{squares}/train/{{00000..00003}}.tar", "--train-num-samples", "32", "--workers", "0"]
    model = ["--model", "ov2-vit-nano-8", "--force-image-size", "16", "--tokenizer", str(vocabulary)]
    flags = [*model, *data, "--global-batch", "16", "--epochs", "3000", "--log-every-n-steps", "1", "--name", "run"]
    submitted = ov2("submit", "--local", "2", "--", *flags, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    status = tmp_path / "logs" / "run" / "status.json"
    deadline = time.monotonic() + 180
    while not status.is_file() or json.loads(status.read_text())["images_per_second"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("logs")
    for logs in ("logs", "link"):  # the same folder by two names
        assert main(["submit", "--local", "2", "--", *flags, "--logs", logs]) == 2
        assert "running already" in capsys.readouterr().err
    assert main(["jobs", "cancel", "run"]) == 0
    while json.loads(status.read_text())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    seen = json.loads(status.read_text())["samples_seen"]
    assert (tmp_path / "logs" / "run" / "checkpoints" / f"stage_1_samples_{seen}.pt").is_file()
    while state_of.of_run("logs/run", []).alive:  # it has saved, and is about to exit
        assert time.monotonic() < deadline
        time.sleep(0.2)
    capsys.readouterr()
    assert main(["jobs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "cancelled"
    assert "rank 0 of 2" in Path(row["log"]).read_text()
    assert main(["submit", "--local", "1", "--wait", "--", *flags, "--epochs", "1", "--name", "short"]) == 0
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "logs" / "short" / "checkpoints" / "stage_1.pt").is_file()


def test_a_debug_run_is_one_process_in_an_allocation_too(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a sidecar for each tar, where a task of SLURM would write every second one."""
    for name, value in (("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    tars = f"{squares}/train/{{00000..00001}}.tar"
    flags = [tars, "--max-tokens", "2", "--device", "cpu", "--out", str(tmp_path / "set")]
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--debug", "--", "captions", "write", *flags]) == 0
    assert sorted(path.name for path in (tmp_path / "set").glob("*.gz")) == ["00000.jsonl.gz", "00001.jsonl.gz"]
    assert json.loads(Path("logs/captions-set/status.json").read_text())["state"] == "finished"

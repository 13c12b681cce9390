"""The state of a run. Oracle: the table written out here, a row for each thing that can happen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from open_clip_ov2.launch import ends, state
from open_clip_ov2.launch.folder import LOCAL, SLURM
from open_clip_ov2.launch.queue import QueueJob, look_up
from open_clip_ov2.tracking.status import Status


def status(state: str, job: str = "7", stage: int = 1, reason: str = "") -> Status:
    return Status(state, stage=stage, stages=2, job_id=job, reason=reason)


def jobs(*states: str) -> list[QueueJob]:
    return [QueueJob(str(7 + index), word, "Priority") for index, word in enumerate(states)]


ROWS = {  # jobs in the queue, the run's own status, -> state, what its reason contains, the job it is about
    "waits": (jobs("PENDING"), None, "queued", "Priority", "7"),
    "begins": (jobs("RUNNING"), None, "starting", "", "7"),
    "runs": (jobs("RUNNING"), status("running"), "running", "", "7"),
    "runs again, its status is of the job before": (jobs("RUNNING"), status("running", "3"), "starting", "", "7"),
    "was preempted": (jobs("PENDING"), status("interrupted"), "queued", "Priority", "7"),
    "failed before, submitted again": (jobs("PENDING"), status("failed", "3"), "queued", "Priority", "7"),
    "has just finished": (jobs("COMPLETING"), status("finished", stage=2), "finished", "", "7"),
    "is being requeued": (jobs("COMPLETING"), status("interrupted"), "starting", "", "7"),
    "finished": (jobs("UNKNOWN"), status("finished", stage=2), "finished", "", "7"),
    "failed": (jobs("FAILED"), status("failed", reason="NaN"), "failed", "NaN", "7"),
    "second stage waits for the first": (jobs("RUNNING", "PENDING"), status("running"), "running", "", "7"),
    "first stage done, second waits": (jobs("COMPLETED", "PENDING"), status("finished"), "queued", "Priority", "8"),
    "first stage failed, second cancelled": (jobs("FAILED", "CANCELLED"), status("failed"), "failed", "", "7"),
    "second stage cancelled": (jobs("COMPLETED", "CANCELLED"), status("finished"), "stopped", "stage 1 of 2", "7"),
    "cancelled while it ran": (jobs("CANCELLED"), status("interrupted"), "cancelled", "by scancel", "7"),
    "killed and forgotten": (jobs("UNKNOWN"), status("running"), "died", "SLURM no longer knows its job", "7"),
    "out of time": (jobs("TIMEOUT"), status("running"), "died", "TIMEOUT", "7"),
    "never wrote a status": (jobs("FAILED"), None, "died", "FAILED", "7"),
    "was not submitted": ([], None, "died", "never submitted", ""),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_state(row: str) -> None:
    queue, own, expected, reason, job = ROWS[row]
    found = state.state_of(queue, own, stages=2, cancelled=False)
    assert (found[0], found[2]) == (expected, job)
    assert reason in found[1]


def test_a_cancelled_run_stays_cancelled() -> None:
    assert state.state_of(jobs("UNKNOWN"), status("failed", reason="x"), 2, cancelled=True)[0] == "cancelled"
    assert state.state_of(jobs("UNKNOWN"), status("finished", stage=2), 2, cancelled=True)[0] == "finished"


def test_an_error_of_a_rank_itself_wins_over_lost_ranks() -> None:
    assert ends.decide_requeue("out of memory", 1, [], "", 3) == (False, "out of memory")


def test_losses_without_progress_fail_the_run() -> None:
    for earlier, newest in (([], ""), (["a", "a"], "b"), (["b"], "b")):
        assert ends.decide_requeue(None, 137, earlier, newest, 3)[0]
    requeue, reason = ends.decide_requeue(None, 137, ["a", "b", "b"], "b", 3)
    assert not requeue
    assert "signal 9" in reason
    assert "3 times since b" in reason


def test_errors_are_read_of_one_start_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand. In the order of time, as the first one is the reason."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restart, rank in ((0, 1), (1, 11), (1, 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        ends.record_error(tmp_path, rank, f"error of {rank}")
    reasons = [[error["reason"] for error in ends.read_errors(tmp_path, "7", restart)] for restart in range(3)]
    assert reasons == [["error of 1"], ["error of 11", "error of 0"], []]
    assert ends.record_loss(tmp_path, 0, "a") == []
    assert ends.record_loss(tmp_path, 0, "b") == ["a"]


def test_local_jobs_are_alive_while_their_process_is() -> None:
    """Oracle: a real process whose command line is submitit's."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit.local._local"])
    try:
        assert look_up(LOCAL, [str(process.pid)])[str(process.pid)].alive
        assert not look_up(LOCAL, [str(os.getpid())])[str(os.getpid())].alive  # a number that another process has now
    finally:
        process.kill()
    time.sleep(0.2)  # a zombie until it is waited for
    assert not look_up(LOCAL, [str(process.pid)])[str(process.pid)].alive
    process.wait()


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look_up(SLURM, ["1", "2_3"]) == {"1": QueueJob("1", "UNKNOWN"), "2_3": QueueJob("2_3", "UNKNOWN")}

"""`ov2 submit --array N -- captions write ...` on a real SLURM of two nodes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from export_fixtures import make_run
from faults import ov2, rank_processes
from slurm_cluster import Cluster, wait_until
from square_shards import write_square_shards

from open_clip_ov2.launch import state


def test_an_array_with_a_killed_task_finishes(cluster: Cluster, tmp_path: Path) -> None:
    """And one with a task that is cancelled and submitted again. Oracle: the sidecars of one process here, byte for
    byte; each element of the array has its own shards, and keeps its name and folder."""
    write_square_shards(tmp_path / "squares", 4, 50)
    make_run(tmp_path / "run")
    argv = [str(tmp_path / "squares" / "{00000..00003}.tar"), "--model", str(tmp_path / "run"), "--device", "cpu"]
    argv += ["--batch-size", "1", "--sampling", "top-k=5,temperature=2", "--max-tokens", "8"]
    cluster_flags = ["--array", "2", "--nodes", "1", "--tasks-per-node", "1", "--time", "20m"]
    submitted = ov2("submit", *cluster_flags, "--", "captions", "write", *argv, "--out", "set", cwd=tmp_path)
    assert "submitted 2 runs as job" in submitted.stdout
    logs, out = tmp_path / "logs" / "captions-set", tmp_path / "set"
    ov2("jobs", "cancel", "captions-set-000", cwd=tmp_path)
    victim = state.of_run("captions-set-001", [logs])
    wait_until(lambda: (out / ".writing" / "00001" / "lines.jsonl").is_file(), 120, "the second task to write")
    ids = rank_processes(victim.job_id)
    assert ids
    os.kill(ids[0], signal.SIGKILL)
    wait_until(lambda: not any(run.alive for run in state.find([logs])), 180, "the array to end")
    assert state.of_run("captions-set-000", [logs]).state == state.CANCELLED
    ov2("jobs", "resubmit", "captions-set-000", cwd=tmp_path)
    wait_until(lambda: not state.of_run("captions-set-000", [logs]).alive, 120, "the first task to end")
    found = {run.spec.name: run for run in state.find([logs])}
    said = {name: (run.state, run.reason) for name, run in found.items()}
    assert [run.state for run in found.values()] == [state.FINISHED] * 2, said
    status = found["captions-set-001"].status
    assert status is not None
    assert status.restarts == 1
    shown = json.loads(ov2("jobs", "--json", cwd=tmp_path).stdout)
    assert sorted(row["name"] for row in shown) == ["captions-set-000", "captions-set-001"]
    assert (
        "4 of 4 shards are finished" in ov2("captions", "write", *argv, "--out", "set", "--status", cwd=tmp_path).stdout
    )
    ov2("captions", "write", *argv, "--out", "here", cwd=tmp_path)
    both = [{path.name: path.read_bytes() for path in folder.glob("*.jsonl.gz")} for folder in (out, tmp_path / "here")]
    assert both[0] == both[1]
    assert len(both[0]) == 4

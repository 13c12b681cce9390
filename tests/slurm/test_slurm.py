"""`ov2 submit`, `jobs` and `sweep` on a real SLURM of two nodes. Oracles are named at each test.

Runs are of the nano model and take seconds; what takes time is importing torch and OpenCLIP in each of their processes.
"""

from __future__ import annotations

import csv
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from faults import (
    ONE_A_NODE,
    RANKS,
    TOTAL_SAMPLES,
    job_of,
    kill_a_rank,
    lose_a_node,
    nano_flags,
    ov2,
    preempt,
    rank_processes,
    requeue,
    wait_finished,
    wait_for_steps,
)  # fmt: skip
from slurm_cluster import Cluster, wait_until
from training import finish, start

from open_clip_ov2.launch import state
from open_clip_ov2.tracking.status import read_status

ONE = ["--nodes", "1", "--tasks-per-node", "1", "--time", "20m"]


def weights(run: Path, stage: int = 1) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"stage_{stage}.pt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path, stage: int = 1) -> None:
    """Bit for bit."""
    a, b = weights(one, stage), weights(other, stage)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are submitted from; they lie in its logs/."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def flags(squares: Path, vocabulary: Path) -> list[str]:
    return nano_flags(squares, vocabulary)


class Undisturbed:
    """The same run by `processes` processes of this machine, without submitit and SLURM, while the test goes on."""

    def __init__(self, place: Path, name: str, flags: list[str], processes: int) -> None:
        self._run = place / "logs" / name
        self._ranks = start([*flags, "--logs", str(place / "logs"), "--name", name], processes)

    def finish(self) -> Path:
        done = finish(self._ranks)
        assert [status for status, _ in done] == [0] * len(done), done
        return self._run


@pytest.fixture(scope="module")
def reference(cluster: Cluster, place: Path, flags: list[str]) -> Path:
    return Undisturbed(place, "reference-4", flags, 4).finish()


def test_two_nodes_with_gpus_end_in_the_same_weights(
    cluster: Cluster, place: Path, flags: list[str], reference: Path
) -> None:
    """Oracle: the weights of four processes here, bit for bit; the ranks' own word on node, GPU and code."""
    ov2("submit", *RANKS, "--gpus-per-node", "2", "--", *flags, "--name", "plain", cwd=place)
    found = wait_finished(place / "logs" / "plain")
    assert_same_weights(found.run_dir, reference)
    assert found.status is not None
    assert (found.status.samples_seen, found.status.restarts, found.status.job_id) == (TOTAL_SAMPLES, 0, found.job_id)
    code = found.submission.code / "open_clip_ov2"
    for rank in range(4):
        log = found.submission.logs / f"{found.job_id}.rank{rank}.restart0.log"
        # The nodes' first two tasks are ranks 0 and 1; each task is given the device file of its place on the node.
        assert f"rank {rank} of 4 on slnode{1 + rank // 2}, GPU {rank % 2}, code {code}" in log.read_text()


def test_faults_do_not_change_the_weights(cluster: Cluster, place: Path, flags: list[str]) -> None:
    """Preempted, requeued by hand, a rank killed, a node lost. Oracle: the weights of two processes here, bit for bit.

    scripts/slurm_soak.py does it with four ranks, over and over.
    """
    # More --max-deaths than faults: after a lost node has come back, SLURM's late order to kill what ran on it can hit
    # the next start of the job (seen once in ten).
    ov2("submit", *ONE_A_NODE, "--max-deaths", "9", "--", *flags, "--name", "troubled", cwd=place)
    run, alone = place / "logs" / "troubled", Undisturbed(place, "reference-2", flags, 2)
    for restarts, fault in enumerate((preempt, requeue, kill_a_rank, lose_a_node)):
        assert wait_for_steps(run, restarts), "the run was over before all faults had hit it"
        job = job_of(run)
        fault(cluster, job)
        if fault is kill_a_rank:  # the others must not wait for it in a collective
            wait_until(lambda job=job: not rank_processes(job), 15, "the other ranks to end")
    found = wait_finished(run)
    assert_same_weights(run, alone.finish())
    assert found.status is not None
    starts = found.status.restarts + 1
    assert starts >= 5
    logs = {path.name for path in found.submission.logs.glob(f"{found.job_id}.rank*.log")}
    assert logs >= {f"{found.job_id}.rank{rank}.restart{count}.log" for rank in range(2) for count in range(4)}
    assert "SIGUSR2" in (found.submission.logs / f"{found.job_id}.rank0.restart0.log").read_text()
    # No result of an interrupted start is there that could pass for the run's: only the last start's.
    results = list(found.submission.logs.glob("*_result.pkl"))
    assert all(path.stat().st_mtime > found.status.started for path in results)


STAGES = [
    "--stage", "16:samples=32,lr=1e-3,warmup-samples=8", "--stage", "24:samples=32,lr=1e-4,warmup-samples=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def staged(flags: list[str]) -> list[str]:
    """The nano run in two stages."""
    words = list(flags)
    for flag in ("--force-image-size", "--train-num-samples", "--epochs", "--lr", "--warmup"):
        at = words.index(flag)
        del words[at : at + 2]
    return words


def test_stages_as_jobs(cluster: Cluster, place: Path, staged: list[str]) -> None:
    """A chain, a chain that is cancelled, a chain whose first job fails. Oracle for the first: both stages in one
    process; for the others what `ov2 jobs` and `--wait` say, and an empty queue."""
    chain = [*ONE, "--stage-jobs"]
    ov2("submit", *chain, "--", *staged, *STAGES, "--name", "chain", cwd=place)
    alone = Undisturbed(place, "reference-staged", [*staged, *STAGES], 1)
    ov2("submit", "--sbatch", "begin=now+1hour", *chain, "--", *staged, *STAGES, "--name", "held", cwd=place)
    again = ov2("submit", *chain, "--", *staged, *STAGES, "--name", "held", cwd=place, check=False)
    assert again.returncode == 2
    assert "queued already, as job" in again.stderr
    held = state.of_run(str(place / "logs" / "held"), [])
    assert len(held.jobs) == 2
    ov2("jobs", "cancel", "held", cwd=place)
    assert not {job.job_id for job in held.jobs} & {name for name, _ in cluster.queue()}
    assert state.of_run(str(held.run_dir), []).state == state.CANCELLED

    broken = [*staged, STAGES[0], STAGES[1].replace("1e-3", "1e30"), *STAGES[2:], "--max-bad-steps", "2"]
    failed = ov2("submit", "--wait", *chain, "--", *broken, "--name", "broken", cwd=place, check=False)
    assert failed.returncode == 2
    assert "2 steps in a row had a non-finite loss" in failed.stderr
    found = wait_finished(place / "logs" / "chain")
    assert [job.stage for job in found.jobs] == [1, 2]
    assert_same_weights(found.run_dir, alone.finish(), stage=2)
    shown = json.loads(ov2("jobs", "--json", cwd=place).stdout)
    reason = {row["name"]: (row["state"], row["reason"]) for row in shown}["broken"]
    assert reason[0] == "failed"
    assert "2 steps in a row had a non-finite loss" in reason[1]
    wait_until(lambda: not cluster.queue(), 15, "an empty queue")
    again = ov2("submit", *chain, "--", *broken, "--name", "broken", cwd=place, check=False)
    assert "--retry continues from its last checkpoint" in again.stderr
    assert "finished already" in ov2("submit", *chain, "--", *staged, *STAGES, "--name", "chain", cwd=place).stdout


SWEEP = """\
[base]
epochs = 1
report-to = "tensorboard"
max-bad-steps = 2
[grid]
model = ["ov2-vit-nano-8"]
keep-ratio = [0.5, 1.0]
[[run]]
model = "local-dir:{folder}"
[[set]]
when = {{ model = "local-dir:{folder}" }}
lr = 1e30
"""


def test_a_sweep(cluster: Cluster, place: Path, flags: list[str], reference: Path) -> None:
    """Two keep ratios, at most two runs at once, and another model that fails on purpose. Oracle: SLURM's queue,
    looked at all the while; results.jsonl."""
    (place / "sweep.toml").write_text(SWEEP.format(folder=reference))
    words = list(flags)
    for flag in ("--model", "--epochs"):
        at = words.index(flag)
        del words[at : at + 2]
    sweep = ["sweep", "sweep.toml"]
    submitted = ov2(*sweep, *ONE, "--max-running", "2", "--", *words, cwd=place)
    assert "submitted 3 runs" in submitted.stdout
    folder, most = place / "logs" / "sweep", 0
    while queue := cluster.queue():
        most = max(most, sum(word == "RUNNING" for _, word in queue))
        time.sleep(0.2)
    assert most == 2
    ov2(*sweep, "--report", cwd=place)
    rows = {row["run"]: row for row in csv.DictReader((folder / "report.csv").open())}
    assert len(rows) == 3
    for name, row in rows.items():
        failing = name == "reference-4"
        assert row["state"] == ("failed" if failing else "finished")
        assert ("non-finite" in row["reason"]) is failing
        assert (row["caption_loss"] == "") is failing
        if not failing:
            last = [json.loads(line) for line in (folder / name / "results.jsonl").read_text().splitlines()][-1]
            assert float(row["caption_loss"]) == pytest.approx(last["caption_loss"], rel=1e-5)
    assert [name for name, row in rows.items() if row["lr"] == "1e+30"] == ["reference-4"]
    assert (folder / "report.png").is_file()
    again = ov2(*sweep, *ONE, "--dry-run", "--", *words, cwd=place).stdout
    assert again.count("finished") == 2
    assert "--retry continues" in again
    assert "nothing to submit" in again


def test_a_cancelled_run_does_not_come_back(cluster: Cluster, place: Path, flags: list[str]) -> None:
    """scancel sends the signal that preemption sends too. Oracle: the queue; the run has saved before it left."""
    ov2("submit", *ONE, "--", *flags, "--epochs", "500", "--name", "unwanted", cwd=place)
    run = place / "logs" / "unwanted"
    assert wait_for_steps(run, 0)
    job = job_of(run)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: job not in dict(cluster.queue()), 30, "the job to leave the queue")
    left = time.monotonic()
    status = read_status(run)
    assert status is not None
    assert status.state == "interrupted"
    assert (run / "checkpoints" / f"stage_1_samples_{status.samples_seen}.pt").is_file()
    what_slurm_refuses_is_one_line(place, flags)
    time.sleep(max(0.0, 8 - (time.monotonic() - left)))  # longer than a requeue takes here
    assert cluster.queue() == []
    assert state.of_run(str(run), []).state == state.CANCELLED


def what_slurm_refuses_is_one_line(place: Path, flags: list[str]) -> None:
    done = ov2("submit", *ONE, "--partition", "nowhere", "--", *flags, "--name", "refused", cwd=place, check=False)
    assert done.returncode == 2
    assert "nvalid partition" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (place / "logs" / "refused").exists()

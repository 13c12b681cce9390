"""A run of seconds on the cluster of scripts/slurm_cluster.py, and what can befall it. For scripts/slurm_soak.py too."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from slurm_cluster import Cluster, wait_until

from open_clip_ov2.launch import state
from open_clip_ov2.runlog.status import read_status

TOTAL_SAMPLES = 160
RANKS = ["--nodes", "2", "--tasks-per-node", "2", "--time", "20m"]


def nano_flags(squares: Path, vocabulary: Path) -> list[str]:
    """20 steps of 8 images, saved after every second."""
    return [
        "--model", "ov2-vit-nano-8", "--force-image-size", "24", "--force-context-length", "12",
        "--tokenizer", str(vocabulary), "--train-data", f"{squares}/train/{{00000..00003}}.tar",
        "--train-num-samples", "32", "--epochs", "5", "--workers", "0", "--global-batch", "8", "--lr", "1e-3",
        "--warmup", "1", "--log-every-n-steps", "1", "--precision", "fp32", "--save-every-steps", "2",
        "--keep-checkpoints", "2",
    ]  # fmt: skip


def ov2(*words: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "open_clip_ov2", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"{words} exited with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def torchrun(flags: list[str], processes: int, cwd: Path) -> subprocess.Popen[bytes]:
    """The run to compare with: on one machine, without a launcher of ours."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}",
        "-m", "open_clip_ov2", "--", "train", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def samples_seen(run: Path) -> int:
    status = read_status(run)
    return status.samples_seen if status is not None else 0


def wait_for_samples(run: Path, at_least: int, restarts: int, timeout_s: float = 120) -> None:
    """Until the run, started again so often, has come so far."""

    def there() -> bool:
        status = read_status(run)
        return status is not None and status.restarts >= restarts and status.samples_seen >= at_least

    wait_until(there, timeout_s, f"{run} to have seen {at_least} samples after {restarts} restarts", poll_s=0.05)


def wait_finished(run: Path, timeout_s: float = 180) -> state.RunState:
    """Until no job of the run is left in the queue."""
    wait_until(lambda: not state.of_run(str(run), []).alive, timeout_s, f"{run} to end")
    found = state.of_run(str(run), [])
    if found.state != state.FINISHED:
        log = found.log()
        raise AssertionError(f"{run}: {found.state}: {found.reason}\n{log.read_text()[-4000:] if log else 'no log'}")
    return found


def job_of(run: Path) -> str:
    return state.of_run(str(run), []).job_id


def rank_processes(job_id: str) -> dict[int, int]:
    """rank -> process id of a job's ranks on this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"submitit.core._submit" not in (path / "cmdline").read_bytes():
                continue
            pairs = (line.partition("=") for line in (path / "environ").read_text().split("\0"))
            environment = {name: value for name, _, value in pairs}
        except (OSError, UnicodeDecodeError):
            continue
        parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[1]
        own = environment.get("SLURM_JOB_ID") == job_id and "SLURM_PROCID" in environment
        is_worker = b"submitit" in Path(f"/proc/{parent}/cmdline").read_bytes()
        if own and not is_worker:
            found[int(environment["SLURM_PROCID"])] = int(path.name)
    return found


# --- faults; each is given the cluster and the run's job -------------------------------------------


def requeue(cluster: Cluster, job_id: str) -> None:
    """As an administrator does: no signal to the job that it could act on."""
    subprocess.run(["scontrol", "requeue", job_id], check=True)


def kill_a_rank(cluster: Cluster, job_id: str, rank: int = 3) -> None:
    os.kill(rank_processes(job_id)[rank], signal.SIGKILL)


def preempt(cluster: Cluster, job_id: str) -> None:
    """By a job of higher priority on both nodes: USR2 and TERM to every rank, a time of grace, and the queue."""
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"]
    subprocess.run([*command, "--output=/dev/null"], check=True, capture_output=True)


def lose_a_node(cluster: Cluster, job_id: str, node: str = "slnode2") -> None:
    """Its slurmd and all that it ran die at once; the node comes back when SLURM has given it up."""
    cluster.kill_node_daemon(node)
    for number in _processes_on(node, job_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    _come_back(cluster, node)


def lose_a_slurmd(cluster: Cluster, job_id: str, node: str = "slnode2") -> None:
    """The daemon alone: SLURM gives the node up while its ranks still run."""
    cluster.kill_node_daemon(node)
    _come_back(cluster, node)


def _come_back(cluster: Cluster, node: str) -> None:
    def given_up() -> bool:
        shown = subprocess.run(["sinfo", "-h", "-n", node, "-o", "%T"], capture_output=True, text=True).stdout
        return "down" in shown

    wait_until(given_up, 60, f"{node} to be given up")
    cluster.start_node(node)


def _processes_on(node: str, job_id: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if f"SLURM_JOB_ID={job_id}" in environment and f"SLURMD_NODENAME={node}" in environment:
            found.append(int(path.name))
    return found


FAULTS: dict[str, Callable[[Cluster, str], None]] = {
    "requeue": requeue,
    "kill-a-rank": kill_a_rank,
    "preempt": preempt,
    "lose-a-node": lose_a_node,
    "lose-a-slurmd": lose_a_slurmd,
}

"""A run of seconds on the cluster of scripts/slurm_cluster.py, and the faults that can hit it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import Cluster, wait_until

from open_clip_ov2 import locks
from open_clip_ov2.cli import main
from open_clip_ov2.launch import state
from open_clip_ov2.tracking.status import FINISHED, read_status

TOTAL_SAMPLES = 320
RANKS = ["--nodes", "2", "--tasks-per-node", "2", "--time", "20m"]
# For a run with many starts: most of a start is the imports, in each of its processes.
ONE_A_NODE = ["--nodes", "2", "--tasks-per-node", "1", "--time", "20m"]


def nano_flags(squares: Path, vocabulary: Path) -> list[str]:
    """40 steps of 8 images, saved after every second."""
    return [
        "--model", "ov2-vit-nano-8", "--force-image-size", "24", "--force-context-length", "12",
        "--tokenizer", str(vocabulary), "--train-data", f"{squares}/train/{{00000..00003}}.tar",
        "--train-num-samples", "32", "--epochs", "10", "--workers", "0", "--global-batch", "8", "--lr", "1e-3",
        "--warmup", "1", "--log-every-n-steps", "1", "--precision", "fp32", "--save-every-steps", "2",
        "--keep-checkpoints", "2",
    ]  # fmt: skip


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def ov2(*words: str, cwd: Path, check: bool = True) -> Done:
    """The command, in this process: importing torch anew for each would take longer than all else."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words)
    finally:
        os.chdir(before)
    if check and status:
        raise AssertionError(f"{words} exited with {status}\n{out.getvalue()}{err.getvalue()}")
    return Done(status, out.getvalue(), err.getvalue())


def torchrun(flags: list[str], processes: int, cwd: Path) -> subprocess.Popen[bytes]:
    """The run to compare with in scripts/slurm_soak.py: on this machine, by torchrun alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}",
        "-m", "open_clip_ov2", "--", "train", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_steps(run: Path, restarts: int, timeout_s: float = 120) -> bool:
    """Until the run, started again so often, is training. False: it has finished before."""

    def there() -> bool:
        status = read_status(run)
        if status is None:
            return False
        return status.state == FINISHED or (status.restarts >= restarts and status.images_per_second is not None)

    wait_until(there, timeout_s, f"{run} to train after {restarts} restarts", poll_s=0.05)
    status = read_status(run)
    return status is not None and status.state != FINISHED


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


def _processes_of(job_id: str) -> list[tuple[int, dict[str, str]]]:
    """(process id, environment) of what a job of THIS cluster runs: there may be another with equal names."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            pairs = (line.partition("=") for line in (path / "environ").read_text().split("\0"))
            environment = {name: value for name, _, value in pairs}
            own = environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
            if own and locks.job_id(environment) == job_id:
                found.append((int(path.name), environment))
    return found


def rank_processes(job_id: str) -> dict[int, int]:
    """rank -> process id of a job's ranks on this machine; a rank's own children left out."""
    ranks = {
        number: int(environment["SLURM_PROCID"])
        for number, environment in _processes_of(job_id)
        if "SLURM_PROCID" in environment and b"submitit" in _read(number, "cmdline")
    }
    return {rank: number for number, rank in ranks.items() if _parent(number) not in ranks}


def _read(number: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{number}/{name}").read_bytes()
    except OSError:
        return b""


def _parent(number: int) -> int:
    return int((_read(number, "stat").rsplit(b")", 1)[-1].split() or [b"", b"0"])[1])


# --- faults; each gets the cluster and the run's job -------------------------------------------


def requeue(cluster: Cluster, job_id: str) -> None:
    """As an administrator does."""
    subprocess.run(["scontrol", "requeue", job_id], check=True)


def kill_a_rank(cluster: Cluster, job_id: str) -> None:
    """The last one."""
    ranks = rank_processes(job_id)
    if ranks:  # the run may end at this moment
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[max(ranks)], signal.SIGKILL)


def preempt(cluster: Cluster, job_id: str) -> None:
    """By a job of higher priority on both nodes: USR2 and TERM to every rank, a time of grace, and the queue."""
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 2"]
    subprocess.run([*command, "--output=/dev/null"], check=True, capture_output=True)


def lose_a_node(cluster: Cluster, job_id: str, node: str = "slnode2") -> None:
    """Its slurmd and all that it ran die at once; the node comes back when SLURM has given it up."""
    cluster.kill_node_daemon(node)
    for number, environment in _processes_of(job_id):
        if environment.get("SLURMD_NODENAME") == node:
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


FAULTS: dict[str, Callable[[Cluster, str], None]] = {
    "requeue": requeue,
    "kill-a-rank": kill_a_rank,
    "preempt": preempt,
    "lose-a-node": lose_a_node,
    "lose-a-slurmd": lose_a_slurmd,
}

"""What runs on every rank of a job: its surroundings, `ov2 train`, and what its end means.

Nothing is taken from submitit's pickles but the folder's name: the run's argv stands in request.json, where it stands
in training on disk (checkpoints), how it ended in status.json and `ends/`. So a requeue with or without a signal, from
whatever moment, is the same thing: the same command again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import submitit
from submitit.core.utils import JobPaths

from open_clip_ov2 import training as trainer
from open_clip_ov2.errors import INTERRUPTED_STATUS, Interrupted, UserError, first_line
from open_clip_ov2.launch.ends import OWN, PEER, End, restart_count, write_end
from open_clip_ov2.launch.folder import Submission, write_json
from open_clip_ov2.tracking.status import job_id

RENDEZVOUS_TIMEOUT_S = 300  # ours: ranks of one job start within minutes of each other, or something is wrong
REQUEUE_TRIES = 3


def run_member(folder: str, member: int, stage: int) -> None:
    """The submitted function. `stage` (from 1): stop after it; 0: all stages. Never returns after a failure."""
    early = _EarlySignals()
    submission = Submission(Path(folder))
    environment = submitit.JobEnvironment()
    rank = environment.global_rank
    _forget_results_of_before(environment.paths)
    _log_to(submission.logs / f"{job_id()}.rank{rank}.restart{restart_count()}.log")
    argv = list(submission.request().members[member].argv)
    if stage:
        argv += ["--until-stage", str(stage)]
    try:
        trainer.load()
        export_ranks(submission)
        if early.name is not None:
            raise Interrupted(f"{early.name} came before training began")
        trainer.train(argv)
    except Interrupted as stop:
        print(f"ov2: stopped: {stop}", flush=True)
        _leave_for_requeue(any_rank=early.name is not None)
    except UserError as error:
        print(f"ov2: error: {error}", flush=True)
        _end(submission, rank, OWN, str(error), status=2)
    except Exception as error:
        traceback.print_exc()
        kind = PEER if trainer.is_lost_peer(error) else OWN
        _end(submission, rank, kind, f"{type(error).__name__}: {first_line(error)}", status=1)


class _EarlySignals:
    """Until `ov2 train` has handlers of its own, remember that a signal came, in the place of submitit's handlers."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.name = signal.Signals(number).name


def _forget_results_of_before(paths: JobPaths) -> None:
    """Results and half-written results of an earlier start of this job would pass for this one's, or stop it."""
    result = paths.result_pickle
    for path in (result, result.with_suffix(result.suffix + ".save_tmp")):
        path.unlink(missing_ok=True)


def _log_to(path: Path) -> None:
    """Everything that this process and its children print, whatever prints it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"log: {path}", flush=True)
    with open(path, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _end(submission: Submission, rank: int, kind: str, reason: str, status: int) -> NoReturn:
    """Say why, and be gone at once: a rank that cleans up with its peers in trouble can hang."""
    write_end(submission.ends, End(job_id(), restart_count(), rank, kind, reason, time.time()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave_for_requeue(any_rank: bool) -> NoReturn:
    """All ranks exit with 0, so that none is taken for dead, and rank 0 has asked SLURM for another start.

    SystemExit passes submitit by: no result is pickled that a later look could take for the run's. Where rank 0 cannot
    ask (no scontrol in a container), its exit status has the batch script ask.
    """
    rank = submitit.JobEnvironment().global_rank
    status = 0
    if "SLURM_JOB_ID" not in os.environ:
        status = INTERRUPTED_STATUS
    elif (rank == 0 or any_rank) and is_running(job_id()):
        status = 0 if _requeue(job_id()) else INTERRUPTED_STATUS
    raise SystemExit(status)


def is_running(job: str) -> bool:
    """False for a job that somebody has cancelled: it must not come back. True where SLURM cannot be asked."""
    if shutil.which("squeue") is None:
        return True
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=60)
        if asked.returncode == 0:
            return asked.stdout.split() == ["RUNNING"]
    return True


def _requeue(job: str) -> bool:
    for attempt in range(REQUEUE_TRIES):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
            print(f"job {job} is back in the queue", flush=True)
            return True
        time.sleep(2**attempt)
    return False


def export_ranks(submission: Submission) -> None:
    """torch.distributed's variables, from SLURM's or submitit's; one GPU for each process."""
    distributed = submitit.helpers.TorchDistributedEnvironment()
    distributed.export(set_cuda_visible_devices=False, overwrite=True)
    if distributed.world_size > 1:
        master = _rendezvous(submission, distributed.rank, distributed.master_addr)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = master
    _own_gpu(distributed.local_rank)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
    where = f"{node}, GPU {gpu}, code {Path(__file__).parents[1]}"
    print(f"rank {distributed.rank} of {distributed.world_size} on {where}", flush=True)


def _own_gpu(local_rank: int) -> None:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not visible:
        return
    # SLURM shows each task all GPUs of the job on its node, or (with --gpu-bind, --gpus-per-task) its own alone.
    own = visible[local_rank] if len(visible) > 1 else visible[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    os.environ["LOCAL_RANK"] = "0"  # OpenCLIP's index of the device among those visible


def _rendezvous(submission: Submission, rank: int, address: str) -> tuple[str, str]:
    """(address, port) that rank 0 listens at: a port free on its machine, told through the shared folder."""
    path = submission.ends / f"rendezvous.{job_id()}.{restart_count()}.json"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            write_json(path, [address, str(probe.getsockname()[1])])
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        # Listing a folder makes network file systems look again.
        if path.name in os.listdir(path.parent if path.parent.is_dir() else submission.folder):
            told: tuple[str, str] = tuple(json.loads(path.read_text()))
            return told
        time.sleep(0.2)
    raise ConnectionError(f"Timed out waiting for rank 0 ({path})")

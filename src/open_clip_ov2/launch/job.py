"""What runs on every rank of a job: set up the rank, run what was submitted, record an error.

submitit's pickle holds only the submission's folder, the run's index and the stage: argv is in request.json, progress
in the checkpoints, an error in status.json and `ends/`. So every restart, after a signal or without one, runs the same
command again.
"""

from __future__ import annotations

import contextlib
import os
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

from open_clip_ov2 import training
from open_clip_ov2.errors import INTERRUPTED_STATUS, Interrupted, InUse, UserError, first_line
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.launch import submitted
from open_clip_ov2.launch.ends import record_error
from open_clip_ov2.launch.folder import Submission
from open_clip_ov2.launch.queue import may_requeue
from open_clip_ov2.locks import job_id, restart_count

_RENDEZVOUS_TIMEOUT_S = 300  # ours: the ranks of a healthy job start within minutes of each other
_REQUEUE_TRIES = 3


def run_member(folder: str, member: int, stage: int) -> None:
    """The submitted function: run `member` of the submission. It does not return after a failure.

    `stage` (from 1): stop after it; 0: all stages.
    """
    early: list[str] = []  # signals that came before `ov2 train` has installed its own handlers
    for number in (signal.SIGUSR2, signal.SIGTERM):  # in place of submitit's
        signal.signal(number, lambda number, _: early.append(signal.Signals(number).name))
    submission = Submission(Path(folder))
    environment = submitit.JobEnvironment()
    rank = environment.global_rank
    _remove_old_results(environment.paths)
    _log_to(submission.logs / f"{job_id()}.rank{rank}.restart{restart_count()}.log")
    spec = submission.request().members[member]
    argv = [*spec.argv, *(["--until-stage", str(stage)] if stage else [])]
    try:
        submitted.load(argv)
        export_ranks(submission)
        if early:
            raise Interrupted(f"{early[0]} came before training began")
        submitted.run(argv, Path(spec.run_dir))
    except Interrupted as stop:
        print(f"ov2: stopped: {stop}", flush=True)
        # Ranks that train stop together, while those that write captions may have ended long before.
        _leave_for_requeue(asking=rank == 0 or submitted.is_captions(argv) or bool(early))
    except UserError as error:
        print(f"ov2: error: {error}", flush=True)
        record_error(submission.exits, rank, str(error), in_use=isinstance(error, InUse))
        _exit(2)
    except Exception as error:
        traceback.print_exc()
        if not training.is_lost_peer(error):
            record_error(submission.exits, rank, f"{type(error).__name__}: {first_line(error)}")
        _exit(1)


def _remove_old_results(paths: JobPaths) -> None:
    """submitit would take the result files of an earlier start of this job for those of this start."""
    result = paths.result_pickle
    for path in (result, result.with_suffix(result.suffix + ".save_tmp")):
        path.unlink(missing_ok=True)


def _log_to(path: Path) -> None:
    """Redirect everything that this process and its children print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"log: {path}", flush=True)
    with open(path, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _exit(status: int) -> NoReturn:
    """Exit at once: cleaning up can hang when other ranks have failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave_for_requeue(asking: bool) -> NoReturn:
    """Exit after the run was saved. Rank 0 asks SLURM to requeue the job; before training began, any rank may.

    Ranks exit with 0, so that srun counts none as lost. SystemExit bypasses submitit, which so pickles no result. If
    rank 0 cannot ask (a container without scontrol), its exit status makes the batch script ask.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise SystemExit(INTERRUPTED_STATUS)
    asked = not asking or not may_requeue(job_id()) or _requeue(job_id())
    raise SystemExit(0 if asked else INTERRUPTED_STATUS)


def _requeue(job: str) -> bool:
    for attempt in range(_REQUEUE_TRIES):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
            print(f"job {job} is back in the queue", flush=True)
            return True
        time.sleep(2**attempt)
    return False


def export_ranks(submission: Submission) -> None:
    """Set torch.distributed's variables from those of SLURM or submitit, and show each process its own GPU alone."""
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
    # A task sees all GPUs that the job has on its node or, with --gpu-bind or --gpus-per-task, its own alone.
    own = visible[local_rank] if len(visible) > 1 else visible[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    os.environ["LOCAL_RANK"] = "0"  # which OpenCLIP uses as the index among the visible devices


def _rendezvous(submission: Submission, rank: int, address: str) -> tuple[str, str]:
    """(address, port) of rank 0, which picks a free port and writes it into the submission's folder for the others."""
    path = submission.exits / f"rendezvous.{job_id()}.{restart_count()}.json"
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            write_json(path, [address, str(probe.getsockname()[1])])
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        if path.name in os.listdir(path.parent):  # listing a folder makes network file systems look again
            found = read_json(path, list)
            return found[0], found[1]
        time.sleep(0.2)
    raise ConnectionError(f"Timed out waiting for rank 0 ({path})")

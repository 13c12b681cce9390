"""ClusterOptions -> submitit's executors, and the sbatch text."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from open_clip_ov2.errors import INTERRUPTED_STATUS, UserError
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import Submission

LOCAL_TIME_MIN = 60 * 24 * 365  # submitit's local jobs end after two minutes unless told otherwise
_PASSED = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "nodes", "cpus_per_task")


class _SlurmExecutor(submitit.SlurmExecutor):
    """Can also be made where there is no SLURM, so that a dry run shows the same text everywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, "")


def check_slurm() -> None:
    """Raises UserError."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "no SLURM on this machine (no sbatch on the PATH): submit from a login node, or run here by --local N; "
            "--dry-run shows what would be submitted"
        )


def slurm(
    submission: Submission, options: ClusterOptions, title: str, *, running_at_once: int = 1, after: str | None = None
) -> _SlurmExecutor:
    """`after`: id of the job that must end well before this one starts. Raises UserError."""
    python = python_command(options)
    executor = _SlurmExecutor(submission.logs, python=_deaf_at_first(python))
    parameters: dict[str, Any] = {name: getattr(options, name) for name in _PASSED}
    parameters |= {
        "job_name": title,
        "time": options.time_min,
        "ntasks_per_node": options.tasks,
        "gpus_per_node": options.gpus_per_node or None,
        "mem": f"{round(options.mem_gb * 1024)}MB" if options.mem_gb else None,
        "signal_delay_s": options.signal_delay_s,
        "array_parallelism": running_at_once,
        "stderr_to_stdout": True,
        "setup": setup_lines(submission, options),
        "teardown": _teardown_lines(submission, options),
        "srun_args": _srun_args(options),
        "dependency": f"afterok:{after}" if after else None,
        "additional_parameters": {"kill-on-invalid-dep": "yes", "requeue": True, **options.sbatch},
    }
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def _srun_args(options: ClusterOptions) -> list[str]:
    # A dead rank must end the job, not leave the others waiting in a collective.
    words = ["--kill-on-bad-exit=1"]
    if options.cpus_per_task:  # since SLURM 22.05 srun does not take it from sbatch
        words.append(f"--cpus-per-task={options.cpus_per_task}")
    return [*words, *_pyxis_args(options), *options.srun_args]


def _pyxis_args(options: ClusterOptions) -> list[str]:
    if not options.container or _is_apptainer(options.container):
        return []
    mounts = [f"--container-mounts={','.join(options.mounts)}"] if options.mounts else []
    return [f"--container-image={options.container}", *mounts]


def python_command(options: ClusterOptions) -> str:
    """How the job starts Python, as shell words."""
    python = options.python or shlex.quote(sys.executable)
    if options.container and _is_apptainer(options.container):
        binds = "".join(f" --bind {shlex.quote(mount)}" for mount in options.mounts)
        gpu = " --nv" if options.gpus_per_node else ""
        return f"apptainer exec{gpu}{binds} {shlex.quote(options.container)} {options.python or 'python'}"
    if options.container:
        return options.python or "python"
    return python


def _is_apptainer(image: str) -> bool:
    return image.endswith(".sif")


def _deaf_at_first(python: str) -> str:
    """Python with the signals ignored that would end it before it can handle them; handlers set later replace this."""
    return f'bash -c \'trap "" USR2 TERM; exec "$@"\' ov2 {python}'


def setup_lines(submission: Submission, options: ClusterOptions) -> list[str]:
    """The user's own lines first, so that a module or an environment of theirs cannot hide the code of this run."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in options.environment.items()]
    return [
        *options.setup,
        f"export OMP_NUM_THREADS={options.threads}",
        *exports,
        f"export PYTHONPATH={shlex.quote(str(submission.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _teardown_lines(submission: Submission, options: ClusterOptions) -> list[str]:
    """After srun: a run that died without a reason of its own goes back into the queue (launch/after.py decides)."""
    python, pyxis = python_command(options), _pyxis_args(options)
    if pyxis:  # the batch script itself is outside of the container
        python = f"{shlex.join(['srun', '--nodes=1', '--ntasks=1', '--overlap', *pyxis])} {python}"
    after = f"{python} -m open_clip_ov2.launch.after {shlex.quote(str(submission.folder))}"
    return [
        "ov2_status=$?",
        "ov2_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; ov2_job=${ov2_job:-$SLURM_JOB_ID}",
        f'[ "$ov2_status" -eq 0 ] || {{ {after} "$ov2_status"; ov2_status=$?; }}',
        f'if [ "$ov2_status" -eq {INTERRUPTED_STATUS} ] && [ "$(squeue -h -j "$ov2_job" -o %T)" = RUNNING ]; then',
        '  scontrol requeue "$ov2_job" && sleep 60',
        "fi",
        'exit "$ov2_status"',
    ]


def local(submission: Submission, options: ClusterOptions) -> submitit.LocalExecutor:
    executor = submitit.LocalExecutor(submission.logs)
    executor.update_parameters(
        timeout_min=LOCAL_TIME_MIN,
        tasks_per_node=options.tasks,
        gpus_per_node=options.gpus_per_node,
        signal_delay_s=options.signal_delay_s,
        stderr_to_stdout=True,
    )
    return executor


def local_environment(submission: Submission, options: ClusterOptions) -> dict[str, str]:
    """What `setup_lines` does for SLURM, without the user's lines, which are for the cluster."""
    before = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": str(options.threads),
        **options.environment,
        "PYTHONPATH": f"{submission.code}{os.pathsep}{before}" if before else str(submission.code),
    }


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables too, for what is started meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def children_print_to(path: Path) -> Iterator[None]:
    """What is started meanwhile, and stays, must not hold on to our terminal or pipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(path, "ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, before in zip((1, 2), saved, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


@contextmanager
def submitting() -> Iterator[None]:
    """Away from the variables of a job that we may be in; what sbatch refuses is one line. Raises UserError."""
    conf = os.environ.get("SLURM_CONF")  # which cluster, not which job
    try:
        with clean_env():
            if conf is not None:
                os.environ["SLURM_CONF"] = conf
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        told = lines[-1].removeprefix("sbatch: ").removeprefix("error: ")
        raise UserError(f"SLURM refused the job: {told} (`sinfo` lists partitions, --dry-run shows the job)") from error


def submit(executor: Any, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[str]:
    """Job ids, in the order of `calls`; several calls are one array. Raises UserError."""
    with submitting():
        if len(calls) == 1:
            return [str(executor.submit(function, *calls[0]).job_id)]
        with executor.batch():
            jobs = [executor.submit(function, *call) for call in calls]
        return [str(job.job_id) for job in jobs]

"""ClusterOptions -> submitit's executors, and the text of the batch script."""

from __future__ import annotations

import copy
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

_LOCAL_TIME_MIN = 60 * 24 * 365  # submitit ends local jobs after two minutes by default
_PASSED_ON = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "nodes", "cpus_per_task")


class SlurmExecutor(submitit.SlurmExecutor):
    """Can be made without SLURM too, so that a dry run shows the same text everywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self, runs: int = 1) -> str:
        """The batch script of a job, or of an array of `runs` jobs."""
        shown = copy.copy(self)
        shown.parameters = {**self.parameters, **({"map_count": runs} if runs > 1 else {})}
        return shown._make_submission_file_text(self._submitit_command_str, "")

    def ids_of(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[str]:
        """Submit the calls, several as one array; their job ids. Raises UserError."""
        with _submitting():
            if len(calls) == 1:
                return [str(self.submit(function, *calls[0]).job_id)]
            with self.batch():
                jobs = [self.submit(function, *call) for call in calls]
            return [str(job.job_id) for job in jobs]


def check_slurm() -> None:
    """Raises UserError if the commands of SLURM are missing on this machine."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError(
            "no SLURM on this machine (sbatch and srun are not on the PATH): submit from a login node, run here with "
            "--local N, or show the job with --dry-run"
        )


def slurm(submission: Submission, options: ClusterOptions, title: str, *, after: str | None = None) -> SlurmExecutor:
    """`after`: id of the job that must end well before this one starts."""
    executor = SlurmExecutor(submission.logs, python=_ignoring_signals(python_command(options)))
    parameters: dict[str, Any] = {name: getattr(options, name) for name in _PASSED_ON}
    parameters |= {
        "job_name": title,
        "time": options.time_min,
        "ntasks_per_node": options.tasks,
        "gpus_per_node": options.gpus_per_node or None,
        "mem": f"{round(options.mem_gb * 1024)}MB" if options.mem_gb else None,
        "signal_delay_s": options.signal_delay_s,
        "array_parallelism": options.max_running,
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
    # A rank that ends must end the job, or the others would wait for it in a collective.
    flags = ["--kill-on-bad-exit=1"]
    if options.cpus_per_task:  # since SLURM 22.05 srun does not inherit it from sbatch
        flags.append(f"--cpus-per-task={options.cpus_per_task}")
    return [*flags, *_pyxis_args(options), *options.srun_args]


def _pyxis_args(options: ClusterOptions) -> list[str]:
    if not options.container or options.in_apptainer:
        return []
    mounts = [f"--container-mounts={','.join(options.mounts)}"] if options.mounts else []
    return [f"--container-image={options.container}", *mounts]


def python_command(options: ClusterOptions) -> str:
    """How the job starts Python, as shell text."""
    if not options.container:
        return options.python or shlex.quote(sys.executable)
    python = options.python or "python"
    if not options.in_apptainer:
        return python
    binds = "".join(f" --bind {shlex.quote(mount)}" for mount in options.mounts)
    gpu = " --nv" if options.gpus_per_node else ""
    return f"apptainer exec{gpu}{binds} {shlex.quote(options.container)} {python}"


def _ignoring_signals(python: str) -> str:
    """Python, started with the job's signals ignored: they would end it before it has handlers of its own."""
    return f'bash -c \'trap "" USR2 TERM; exec "$@"\' ov2 {python}'


def setup_lines(submission: Submission, options: ClusterOptions) -> list[str]:
    """The user's lines come first, so that a module or environment of theirs cannot hide the snapshot of the code."""
    variables = {"OMP_NUM_THREADS": str(options.threads), **options.environment}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    path = f"export PYTHONPATH={shlex.quote(str(submission.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [*options.setup, *exports, path]


def _teardown_lines(submission: Submission, options: ClusterOptions) -> list[str]:
    """After srun: requeue the job if ends.py decides so, or if the run has saved and asks for it."""
    python, pyxis = python_command(options), _pyxis_args(options)
    if pyxis:  # the batch script itself runs outside the container
        python = f"{shlex.join(['srun', '--nodes=1', '--ntasks=1', '--overlap', *pyxis])} {python}"
    decide = f"{python} -m open_clip_ov2.launch.ends {shlex.quote(str(submission.folder))}"
    return [
        "ov2_status=$?",
        "ov2_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; ov2_job=${ov2_job:-$SLURM_JOB_ID}",
        f'[ "$ov2_status" -eq 0 ] || {{ {decide} "$ov2_status"; ov2_status=$?; }}',
        f'if [ "$ov2_status" -eq {INTERRUPTED_STATUS} ] && [ "$(squeue -h -j "$ov2_job" -o %T)" = RUNNING ]; then',
        '  scontrol requeue "$ov2_job" && sleep 60',
        "fi",
        'exit "$ov2_status"',
    ]


def start_locally(
    submission: Submission, options: ClusterOptions, function: Callable[..., Any], call: tuple[Any, ...]
) -> str:
    """Start the tasks on this machine, in the background; the job's id. Raises UserError."""
    executor = submitit.LocalExecutor(submission.logs)
    executor.update_parameters(
        timeout_min=_LOCAL_TIME_MIN,
        tasks_per_node=options.tasks,
        gpus_per_node=options.gpus_per_node,
        signal_delay_s=options.signal_delay_s,
        stderr_to_stdout=True,
    )
    # As `setup_lines`, without the user's lines, which are for the cluster.
    path = filter(None, (str(submission.code), os.environ.get("PYTHONPATH")))
    variables = {"OMP_NUM_THREADS": str(options.threads), **options.environment, "PYTHONPATH": os.pathsep.join(path)}
    with environment(variables), _children_print_to(submission.logs / "controller.log"), _submitting():
        return str(executor.submit(function, *call).job_id)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for what is started in the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _children_print_to(path: Path) -> Iterator[None]:
    """Redirect the output of what is started in the block, so that it does not keep our terminal or pipe open."""
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
def _submitting() -> Iterator[None]:
    """Hide the variables of a job that we may be in; what sbatch refuses is one line. Raises UserError."""
    conf = os.environ.get("SLURM_CONF")  # says which cluster, not which job
    try:
        with clean_env():
            if conf is not None:
                os.environ["SLURM_CONF"] = conf
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        reason = lines[-1].removeprefix("sbatch: ").removeprefix("error: ")
        raise UserError(
            f"SLURM refused the job: {reason} (`sinfo` lists partitions, --dry-run shows the job)"
        ) from error

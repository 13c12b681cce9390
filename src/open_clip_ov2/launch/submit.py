"""From a checked command line to jobs: show the plan, write the submission's folder, submit."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

from submitit.helpers import clean_env

import open_clip_ov2
from open_clip_ov2.argv import value_of, without
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import executor as executors
from open_clip_ov2.launch import state, submitted
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import LOCAL, SLURM, Job, Request, Submission, next_submission
from open_clip_ov2.launch.job import run_member
from open_clip_ov2.launch.queue import cancel

PACKAGE = Path(open_clip_ov2.__file__).parent
_DIFF_LIMIT = 5_000_000  # characters, ours: a larger difference is somebody's data


def is_over(run: state.RunState, retry: bool) -> bool:
    """Whether a run that was submitted before has finished. Raises UserError if it is not to be submitted again for
    another reason."""
    why = run.why_not(retry)
    if why and run.state != state.FINISHED:
        raise UserError(f"{run.run_dir}: {why}")
    if why:
        print(f"{run.run_dir}: {why}")
    return bool(why)


def resubmit(run: state.RunState) -> tuple[Job, ...]:
    """Check and submit the run's newest submission once more, with the code as it is now. Raises UserError."""
    before = run.request
    spec = submitted.plan_run(run.spec.argv, before.clusters, run.spec.varied)
    spec = replace(spec, name=run.spec.name, run_dir=run.spec.run_dir)  # an element of an array keeps its folder
    return submit(run.run_dir, replace(before, title=spec.name, members=(spec,), created=time.time()))


def submit(folder: Path, request: Request) -> tuple[Job, ...]:
    """Write the submission into the folder and start its jobs; if that fails, nothing is left. Raises UserError."""
    if request.executor == SLURM:
        executors.check_slurm()
    submission = next_submission(folder)
    options, first = request.clusters[0], request.members[0]
    try:
        _keep_code(submission, request.command)
        specs = (replace(spec, argv=_keep_recipe(submission, spec.argv)) for spec in request.members)
        request = replace(request, members=tuple(specs))
        submission.write_request(request)
        if request.executor == SLURM:
            jobs = _to_slurm(submission, request)
        elif request.executor == LOCAL:
            call = (str(submission.folder), 0, 0)
            jobs = [Job(executors.start_locally(submission, options, run_member, call))]
        else:  # in this process and terminal, without a log file; errors are raised as they are
            with clean_env(), executors.environment(options.environment):  # one process, in an allocation too
                submitted.run(first.argv, Path(first.run_dir))
            jobs = [Job("debug")]
    except (UserError, OSError):
        submission.discard()
        raise
    submission.write_jobs(jobs)
    return tuple(jobs)


def batch_scripts(folder: Path, request: Request) -> dict[str, str]:
    """What sbatch would get, by file name; nothing is written. Empty for other executors than SLURM."""
    submission, texts = next_submission(folder, make=False), {}
    for stage, cluster in request.stage_clusters if request.executor == SLURM else []:
        after = f"STAGE_{stage - 1}" if stage > 1 else None
        _, name, texts[name] = _batch(submission, request, stage, cluster, after)
    return texts


def _batch(
    submission: Submission, request: Request, stage: int, cluster: ClusterOptions, after: str | None
) -> tuple[executors.SlurmExecutor, str, str]:
    """(executor, name and text of the batch script) of a job; `after`: the job that must end well before."""
    title = f"{request.title}-stage-{stage}" if stage else request.title
    made = executors.slurm(submission, cluster, title, after=after)
    return made, f"sbatch.stage-{stage}.sh" if stage else "sbatch.sh", made.text(len(request.members))


def _to_slurm(submission: Submission, request: Request) -> list[Job]:
    """One job (an array, for several runs), or a chain of jobs for the stages that are not done yet."""
    jobs: list[Job] = []
    done = submitted.stages_done(Path(request.members[0].run_dir)) if request.stage_jobs else -1
    try:
        for stage, cluster in request.stage_clusters:
            if stage <= done:
                continue
            made, name, text = _batch(submission, request, stage, cluster, jobs[-1].job_id if jobs else None)
            (submission.folder / name).write_text(text, encoding="utf-8")
            calls = [(str(submission.folder), index, stage) for index in range(len(request.members))]
            ids = made.ids_of(run_member, calls)
            jobs += [Job(job_id, index, stage) for index, job_id in enumerate(ids)]
    except (UserError, OSError):
        cancel(SLURM, [job.job_id for job in jobs])
        raise
    return jobs


def _keep_code(submission: Submission, command: Sequence[str]) -> None:
    """So that the job runs what was submitted: the package, the command line, versions, git's state."""
    # With its bytecode, which so is not compiled once more by each rank; not with files that are being written there.
    shutil.copytree(PACKAGE, submission.code / PACKAGE.name, ignore=shutil.ignore_patterns("*.pyc.*"))
    texts = {"command.txt": shlex.join(command) + "\n", "versions.txt": _versions(), "git.txt": _git_state(PACKAGE)}
    for name, text in texts.items():
        if text:
            (submission.folder / name).write_text(text, encoding="utf-8")


def _keep_recipe(submission: Submission, argv: Sequence[str]) -> tuple[str, ...]:
    """Copy the recipe, if there is one, into the submission's folder; `argv` with --recipe pointing to the copy."""
    recipe = value_of(argv, "--recipe")
    if recipe is None or (submitted.is_vlm(argv) and not Path(recipe).is_file()):  # a recipe of the package
        return tuple(argv)
    copy = submission.folder / "recipe" / Path(recipe).name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(recipe, copy)
    return (*without(argv, ("--recipe",)), "--recipe", str(copy))


def _versions() -> str:
    names = sorted({f"{found.metadata['Name']}=={found.version}" for found in distributions()}, key=str.lower)
    return "\n".join([f"python=={platform.python_version()}", *names]) + "\n"


def _git_state(folder: Path) -> str:
    """Commit, status and uncommitted changes; empty outside a repository."""
    outputs = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD")):
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        outputs.append(done.stdout)
    commit, status, diff = outputs
    return f"commit {commit}\n{status}\n{diff[:_DIFF_LIMIT]}"


def show_plan(folder: Path, request: Request) -> None:
    print(f"folder    {folder}")
    print(f"cluster   {request.cluster_file or 'no cluster file'}")
    for stage, cluster in request.stage_clusters:
        print(f"job       {f'stage {stage}: ' if stage else ''}{_resources(cluster, request.executor)}")
    for spec in request.members:
        name = f"{spec.name}: " if len(request.members) > 1 else ""
        size = f", {spec.parameters / 1e6:,.1f} M parameters" if spec.parameters else ""
        samples = f", {spec.total_samples:,} samples" if spec.total_samples else ""
        print(f"run       {name}{spec.model}{size}{samples}")
        for number, summary in enumerate(spec.summaries, 1):
            if summary:
                print(f"          stage {number}: {summary}")


def _resources(options: ClusterOptions, executor: str) -> str:
    tasks = f"{options.world_size} process{'es' if options.world_size > 1 else ''}"
    device = f"{options.gpus_per_node} GPUs per node" if options.gpus_per_node else "on CPUs"
    if executor != SLURM:
        return f"{executor}, {tasks}, {device}"
    nodes = f"{options.nodes} node{'s' if options.nodes > 1 else ''}"
    queue = f"partition {options.partition}" if options.partition else "default partition"
    hours, minutes = divmod(options.time_min, 60)
    return f"{nodes}, {tasks}, {device}, {queue}, {hours} h {minutes:02d} min"

"""From a checked command line to jobs: finds the run again, writes its folder, submits."""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip_ov2 import training as trainer
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import executor as executors
from open_clip_ov2.launch import snapshot, state
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import DEBUG, LOCAL, SLURM, SUBMIT, Job, Member, Request, Submission, new_submission
from open_clip_ov2.launch.job import run_member
from open_clip_ov2.launch.queue import cancel


@dataclass(frozen=True)
class Work:
    """One or more runs that are submitted together. `folder`: the run's, or the sweep's."""

    folder: Path
    title: str
    members: tuple[Member, ...]
    checked: tuple[trainer.Checked, ...]


def member_of(
    argv: Sequence[str], clusters: Sequence[ClusterOptions], varied: Mapping[str, Any] | None = None
) -> tuple[Member, trainer.Checked]:
    """Raises UserError for whatever would fail later."""
    surroundings = ((item.world_size, item.gpus_per_node > 0, item.gpu_memory_gb) for item in clusters)
    checked = [trainer.check(argv, *each) for each in dict.fromkeys(surroundings)]
    if len({found.signature for found in checked}) > 1:
        raise UserError(
            "--nodes differs between stages, and with it the global batch: give --global-batch, or batches of stages"
        )
    found = checked[0]
    named = any(word == "--name" or word.startswith("--name=") for word in argv)
    own = tuple(argv) if named else (*argv, "--name", found.name)
    member = Member(
        name=found.name,
        run_dir=str(found.run_dir.absolute()),
        argv=own,
        signature=found.signature,
        model=found.model,
        stages=len(found.stages),
        total_samples=found.total_samples,
        varied=dict(varied or {}),
    )
    return member, found


def run_work(argv: Sequence[str], clusters: Sequence[ClusterOptions]) -> Work:
    member, checked = member_of(argv, clusters)
    return Work(Path(member.run_dir), member.name, (member,), (checked,))


def check_again(found: state.RunState, retry: bool) -> bool:
    """Whether to submit a run that was submitted before. Raises UserError."""
    where = f"{found.run_dir}"
    if found.alive:
        raise UserError(f"{where}: {found.state} already, as job {found.job_id} (`ov2 jobs` says more)")
    if found.state == state.FINISHED:
        print(f"{where}: finished already ({found.status.samples_seen if found.status else 0:,} samples)")
        return False
    if not retry:
        raise UserError(f"{where}: {found.state}: {found.reason}; --retry goes on from its last checkpoint")
    return True


def earlier(work: Work) -> dict[str, state.RunState]:
    """Members that were submitted before, by the folder of their run."""
    return {found.member.run_dir: found for found in state.find([work.folder])}


@dataclass(frozen=True)
class How:
    """`command`: the whole command line; `argv`: what was given after `--`."""

    executor: str
    clusters: tuple[ClusterOptions, ...]
    command: tuple[str, ...]
    argv: tuple[str, ...]
    cluster_file: Path | None = None
    stage_jobs: bool = False
    running_at_once: int = 256


def again(run: state.RunState) -> tuple[Work, How]:
    """The run's newest submission, once more; checked again. Raises UserError."""
    request = run.request
    member, checked = member_of(run.member.argv, request.clusters, run.member.varied)
    how = How(
        executor=request.executor,
        clusters=request.clusters,
        command=request.command,
        argv=request.given_argv,
        cluster_file=Path(request.cluster_file) if request.cluster_file else None,
        stage_jobs=request.stage_jobs,
    )
    return Work(run.run_dir, member.name, (member,), (checked,)), how


def request_of(work: Work, how: How) -> Request:
    return Request(
        title=work.title,
        executor=how.executor,
        command=how.command,
        given_argv=how.argv,
        created=time.time(),
        user=getpass.getuser(),
        host=socket.gethostname(),
        cwd=os.getcwd(),
        cluster_file=str(how.cluster_file) if how.cluster_file else None,
        clusters=how.clusters,
        stage_jobs=how.stage_jobs,
        members=work.members,
    )


def submit(work: Work, how: How) -> tuple[Submission, tuple[Job, ...]]:
    """Write the folder, submit. What SLURM refuses leaves no submission behind. Raises UserError."""
    if how.executor == SLURM:
        executors.check_slurm()
    submission = new_submission(work.folder)
    snapshot.take(submission, how.command)
    members = []
    for member, checked in zip(work.members, work.checked, strict=True):
        argv = member.argv
        if checked.recipe is not None:
            argv = snapshot.keep_recipe(submission, checked.recipe, argv)
        members.append(replace(member, argv=argv))
    work = replace(work, members=tuple(members))
    submission.write_request(request_of(work, how))
    try:
        jobs = _SUBMITTERS[how.executor](submission, work, how)
    except UserError:
        submission.discard()
        raise
    submission.write_jobs(jobs)
    return submission, tuple(jobs)


def _to_slurm(submission: Submission, work: Work, how: How) -> list[Job]:
    if how.stage_jobs:
        return _chain(submission, work, how)
    calls = [(str(submission.folder), index, 0) for index in range(len(work.members))]
    made = executors.slurm(submission, how.clusters[0], work.title, running_at_once=how.running_at_once)
    (submission.folder / "sbatch.sh").write_text(made.text(), encoding="utf-8")
    ids = executors.submit(made, run_member, calls)
    return [Job(job_id, index) for index, job_id in enumerate(ids)]


def _chain(submission: Submission, work: Work, how: How) -> list[Job]:
    """A job for each stage, after the one before; those done already are left out."""
    jobs: list[Job] = []
    try:
        for stage, cluster in enumerate(how.clusters, 1):
            if stage <= stages_done(Path(work.members[0].run_dir)):
                continue
            parent = jobs[-1].job_id if jobs else None
            made = executors.slurm(submission, cluster, f"{work.title}-stage-{stage}", after=parent)
            (submission.folder / f"sbatch.stage-{stage}.sh").write_text(made.text(), encoding="utf-8")
            (job_id,) = executors.submit(made, run_member, [(str(submission.folder), 0, stage)])
            jobs.append(Job(job_id, 0, stage))
    except UserError:
        cancel(SLURM, [job.job_id for job in jobs])
        raise
    return jobs


def stages_done(run_dir: Path) -> int:
    """Stages whose last checkpoint is there, from the first on."""
    done = 0
    while (run_dir / "checkpoints" / f"stage_{done + 1}.pt").is_file():
        done += 1
    return done


def _to_local(submission: Submission, work: Work, how: How) -> list[Job]:
    made = executors.local(submission, how.clusters[0])
    surroundings = executors.environment(executors.local_environment(submission, how.clusters[0]))
    with surroundings, executors.children_print_to(submission.logs / "controller.log"):
        ids = executors.submit(made, run_member, [(str(submission.folder), 0, 0)])
    return [Job(ids[0])]


def _debug(submission: Submission, work: Work, how: How) -> list[Job]:
    """In this process, with its terminal: no log file, no job; errors come out as they are."""
    with executors.environment(dict(how.clusters[0].environment)):
        trainer.train(work.members[0].argv)
    return [Job("debug")]


_SUBMITTERS = {SLURM: _to_slurm, LOCAL: _to_local, DEBUG: _debug}


def dry_run_texts(work: Work, how: How) -> dict[str, str]:
    """What sbatch would get, by file name; nothing is written. Empty without SLURM's executor."""
    if how.executor != SLURM:
        return {}
    number = len(list((work.folder / SUBMIT).glob("[0-9]*"))) + 1
    submission = Submission((work.folder / SUBMIT / f"{number:03d}").absolute())
    if not how.stage_jobs:
        made = executors.slurm(submission, how.clusters[0], work.title, running_at_once=how.running_at_once)
        if len(work.members) > 1:
            made.parameters["map_count"] = len(work.members)
        return {"sbatch.sh": made.text()}
    return {
        f"sbatch.stage-{stage}.sh": executors.slurm(
            submission, cluster, f"{work.title}-stage-{stage}", after=f"STAGE_{stage - 1}" if stage > 1 else None
        ).text()
        for stage, cluster in enumerate(how.clusters, 1)
    }

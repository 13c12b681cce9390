"""`ov2 submit`: `ov2 train` on SLURM, on this machine in the background, or in this process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from open_clip_ov2.argv import Parser, flag_type, split
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import captions_job, cluster, state, submit, submitted
from open_clip_ov2.launch.cluster import ClusterOptions, add_cluster_flags, given_flags
from open_clip_ov2.launch.folder import DEBUG, LOCAL, SLURM, Request
from open_clip_ov2.tables import whole

_POLL_S = 1.0


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    if not after:
        raise UserError(
            "ov2 submit: the flags of `ov2 train` (or vlm train and its flags) are missing: ov2 submit --nodes 2 ... "
            "-- --model ..."
        )
    executor = LOCAL if args.local is not None else DEBUG if args.debug else SLURM
    file = cluster.find_file(args.cluster)
    if captions_job.is_captions(after):
        return _submit_captions(args, file, executor, argv, after)
    if args.array != 1:
        raise UserError("--array is for `captions write`; `ov2 sweep` trains several runs")
    clusters = _clusters(args, file, executor, after)
    spec = submit.plan_run(after, clusters)
    request = Request(
        title=spec.name,
        executor=executor,
        command=("ov2", "submit", *argv),
        cluster_file=str(file) if file else None,
        clusters=clusters,
        members=(spec,),
        stage_jobs=args.stage_jobs,
    )
    folder = Path(spec.run_dir)
    submit.show_plan(folder, request)
    found = next((run for run in state.find([folder]) if run.run_dir.resolve() == folder.resolve()), None)
    if found is not None and not submit.needs_submission(found, args.retry) and not args.dry_run:
        return
    if args.dry_run:
        show_batch_scripts(folder, request)
        return
    ids = ", ".join(job.job_id for job in submit.submit(folder, request))
    if args.debug:
        print(f"{folder}: trained in this process; `ov2 jobs {folder}` shows how far")
    else:
        print(f"submitted as job {ids}; `ov2 jobs` shows its state, `ov2 jobs logs {spec.name}` its output")
    if args.wait:
        wait(folder)


def _submit_captions(
    args: argparse.Namespace, file: Path | None, executor: str, argv: Sequence[str], after: list[str]
) -> None:
    """An array of tasks that write captions. Submitted again, it goes on with what is missing."""
    if args.stage_jobs or (executor != SLURM and args.array != 1):
        raise UserError("--array and SLURM go together, and captions have no stages: leave out --stage-jobs")
    (options,) = _clusters(args, file, executor, after)
    members = captions_job.plan_captions(after, args.array)
    request = Request(
        title=members[0].name.removesuffix("-000"),
        executor=executor,
        command=("ov2", "submit", *argv),
        cluster_file=str(file) if file else None,
        clusters=(replace(options, srun_args=(*captions_job.SRUN_ARGS, *options.srun_args)),),
        members=tuple(members),
    )
    folder = (captions_job.LOGS / request.title).absolute()
    submit.show_plan(folder, request)
    alive = [run.spec.name for run in state.find([folder]) if run.alive]
    if alive:
        raise UserError(f"{', '.join(alive)}: queued or running already (see `ov2 jobs`)")
    if args.dry_run:
        return show_batch_scripts(folder, request)
    ids = ", ".join(job.job_id for job in submit.submit(folder, request))
    print(f"submitted as job {ids}; `ov2 jobs` shows its state, `ov2 captions write ... --status` the captions")
    if args.wait:
        wait(folder)


def show_batch_scripts(folder: Path, request: Request) -> None:
    for name, text in submit.batch_scripts(folder, request).items():
        print(f"\n--- {name}\n{text}")
    print("dry run: nothing was written or submitted")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 submit",
        usage="ov2 submit [flags] -- FLAGS OF OV2 TRAIN, or -- vlm train FLAGS, or -- captions write FLAGS",
        description="Run `ov2 train`, `ov2 vlm train` or `ov2 captions write` on SLURM. The flags after `--` are "
        "checked before anything is submitted.",
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="show the plan, the folder and the batch script; submit nothing")
    add("--retry", action="store_true", help="continue a run that failed, from its last checkpoint")
    of_array = "N jobs that share the shards of `captions write` (default: 1)"
    add("--array", type=flag_type(whole(1)), default=1, metavar="N", help=of_array)
    add("--stage-jobs", action="store_true", help="submit a job for each stage; each waits for the one before")
    add("--wait", action="store_true", help="wait until the run is over; exit status 2 if it did not finish")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", type=int, metavar="N", help="N processes on this machine, without SLURM")
    where.add_argument("--debug", action="store_true", help="in this process, without SLURM")
    add_cluster_flags(parser, without=["max-running"])
    return parser


def _clusters(
    args: argparse.Namespace, file: Path | None, executor: str, argv: list[str]
) -> tuple[ClusterOptions, ...]:
    flags = given_flags(args)
    if executor == SLURM:
        if not args.stage_jobs:
            return cluster.resolve(flags, file)
        of_first = {name: flags[name].split(",")[0] for name in cluster.OF_EACH_STAGE if name in flags}
        (first,) = cluster.resolve({**flags, **of_first}, file)
        stages = len(submitted.check(argv, first.world_size, first.gpus_per_node > 0).stages)
        return cluster.resolve(flags, file, stages)
    if args.stage_jobs:
        raise UserError("--stage-jobs needs SLURM; --local and --debug train all stages one after the other anyway")
    if args.local is not None and args.local < 1:
        raise UserError(f"--local {args.local}: expected at least one process")
    (options,) = cluster.resolve(flags, file)
    tasks = args.local or 1
    return (replace(options, nodes=1, tasks_per_node=tasks, gpus_per_node=_gpus_here(tasks)),)


def _gpus_here(tasks: int) -> int:
    """One for each process, or 0 on a machine without GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < tasks:
        raise UserError(f"--local {tasks}: this machine has {gpus} GPUs; set CUDA_VISIBLE_DEVICES= to train on the CPU")
    return min(gpus, tasks)


def wait(folder: Path) -> None:
    """Wait until all runs in the folder are over. Raises UserError for the first that did not finish."""
    found = state.find([folder])
    while any(run.alive for run in found):
        time.sleep(_POLL_S)
        found = state.find([folder])
    for run in found:
        if run.state != state.FINISHED:
            raise UserError(f"{run.run_dir}: {run.state}: {run.reason}")
        print(f"{run.run_dir}: finished")

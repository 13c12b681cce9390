"""`ov2 submit`: `ov2 train` on SLURM, on this machine in the background, or in this process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from open_clip_ov2 import training as trainer
from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.cluster_flags import add_cluster_flags, given_flags, split
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import cluster, state, submit
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import DEBUG, LOCAL, SLURM
from open_clip_ov2.launch.plan import show_plan

POLL_S = 1.0


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    if not after:
        raise UserError("ov2 submit: the flags of `ov2 train` are missing: ov2 submit --nodes 2 ... -- --model ...")
    executor = LOCAL if args.local is not None else DEBUG if args.debug else SLURM
    file = cluster.find_file(args.cluster)
    clusters = _clusters(args, file, executor, after)
    work = submit.run_work(after, clusters)
    how = submit.How(
        executor=executor,
        clusters=clusters,
        command=("ov2", "submit", *argv),
        argv=tuple(after),
        cluster_file=file,
        stage_jobs=args.stage_jobs,
    )
    show_plan(work, how)
    found = submit.earlier(work).get(work.members[0].run_dir)
    if found is not None and not submit.check_again(found, args.retry) and not args.dry_run:
        return
    if args.dry_run:
        for name, text in submit.dry_run_texts(work, how).items():
            print(f"\n--- {name}\n{text}")
        print("dry run: nothing was written or submitted")
        return
    _, jobs = submit.submit(work, how)
    ids = ", ".join(job.job_id for job in jobs)
    print(f"submitted as job {ids}: `ov2 jobs` shows where it stands, `ov2 jobs logs {work.title}` what it says")
    if args.wait:
        wait(work.folder)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 submit",
        usage="ov2 submit [flags] -- FLAGS OF OV2 TRAIN",
        description="Run `ov2 train` on SLURM. What stands after `--` is checked before anything is submitted.",
    )
    add = parser.add_argument
    add("--dry-run", action="store_true", help="show the plan, the folder and the sbatch file; submit nothing")
    add("--retry", action="store_true", help="go on with a run that failed, from its last checkpoint")
    add("--stage-jobs", action="store_true", help="a job for each stage, each after the one before")
    add("--wait", action="store_true", help="until the run is over; exit status 2 if it did not finish")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", type=int, metavar="N", help="on this machine, N processes, no SLURM")
    where.add_argument("--debug", action="store_true", help="in this process, no SLURM")
    add_cluster_flags(parser)
    return parser


def _clusters(
    args: argparse.Namespace, file: Path | None, executor: str, argv: list[str]
) -> tuple[ClusterOptions, ...]:
    given = given_flags(args)
    if executor == SLURM:
        if not args.stage_jobs:
            return cluster.resolve(given, file)
        firsts = {key: value[:1] if key in ("nodes", "time_min") else value for key, value in given.items()}
        (first,) = cluster.resolve(firsts, file)
        stages = len(trainer.check(argv, first.world_size, first.gpus_per_node > 0).stages)
        return cluster.resolve(given, file, stages)
    if args.stage_jobs:
        raise UserError("--stage-jobs is for SLURM: here one process after the other trains all stages anyway")
    if args.local is not None and args.local < 1:
        raise UserError(f"--local {args.local}: at least one process")
    (options,) = cluster.resolve(given, file)
    tasks = args.local or 1
    return (replace(options, nodes=1, tasks_per_node=tasks, gpus_per_node=_gpus_here(tasks)),)


def _gpus_here(tasks: int) -> int:
    """One for each process, or none on a machine without."""
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < tasks:
        raise UserError(f"--local {tasks}: this machine has {gpus} GPUs; CUDA_VISIBLE_DEVICES= runs on the CPU")
    return min(gpus, tasks)


def wait(folder: Path) -> None:
    """Until no run in the folder is under way. Raises UserError for the first that did not finish."""
    while True:
        found = state.find([folder])
        if not any(run.alive for run in found):
            break
        time.sleep(POLL_S)
    for run in found:
        if run.state != state.FINISHED:
            raise UserError(f"{run.run_dir}: {run.state}: {run.reason}")
        print(f"{run.run_dir}: finished")

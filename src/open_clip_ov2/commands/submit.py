"""`ov2 submit`: `ov2 train` on SLURM, on this machine in the background, or in this process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from open_clip_ov2.argv import Parser, flag_type, split
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import cluster, state, submit, submitted
from open_clip_ov2.launch.cluster import ClusterOptions, add_cluster_flags, given_flags
from open_clip_ov2.launch.folder import DEBUG, LOCAL, SLURM, Request
from open_clip_ov2.tables import whole

_POLL_S = 1.0


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    if not after:
        raise UserError("ov2 submit: what is to run is missing, for example: ov2 submit --nodes 2 ... -- --model ...")
    executor = LOCAL if args.local is not None else DEBUG if args.debug else SLURM
    file, writes = cluster.find_file(args.cluster), submitted.is_captions(after)
    if writes and (args.stage_jobs or (executor != SLURM and args.array != 1)):
        raise UserError("--array and SLURM go together, and captions have no stages: leave out --stage-jobs")
    if args.array != 1 and not writes:
        raise UserError("--array is for `captions write`; `ov2 sweep` trains several runs")
    clusters = _clusters(args, file, executor, after)
    if writes:
        members = submitted.plan_captions(after, args.array)
        title = members[0].name.removesuffix("-000")
        folder, logs = (submitted.LOGS / title).absolute(), "`ov2 captions write ... --status` the captions"
        # A task that ends must not end the others of its job, which share nothing with it.
        clusters = tuple(replace(one, srun_args=("--kill-on-bad-exit=0", *one.srun_args)) for one in clusters)
    else:
        members = [submitted.plan_run(after, clusters)]
        title, folder = members[0].name, Path(members[0].run_dir)
        logs = f"`ov2 jobs logs {title}` its output"
    request = Request(
        title=title,
        executor=executor,
        command=("ov2", "submit", *argv),
        cluster_file=str(file) if file else None,
        clusters=clusters,
        members=tuple(members),
        stage_jobs=args.stage_jobs,
    )
    # Captions are never over: the same command goes on with what is missing.
    found = state.find([folder])
    earlier = [run for run in found if (run.alive if writes else run.run_dir.resolve() == folder.resolve())]
    if not any(submit.is_over(run, args.retry) for run in earlier) or args.dry_run:
        carry_out(folder, request, args, f"`ov2 jobs` shows its state, {logs}")


def carry_out(folder: Path, request: Request, args: argparse.Namespace, hint: str) -> None:
    """Show the plan and, without --dry-run, submit it; with --wait, wait for its end. `hint`: where to look then."""
    submit.show_plan(folder, request)
    if args.dry_run:
        for name, text in submit.batch_scripts(folder, request).items():
            print(f"\n--- {name}\n{text}")
        print("dry run: nothing was written or submitted")
        return
    jobs = submit.submit(folder, request)
    if request.executor == DEBUG:
        print(f"{folder}: done in this process; `ov2 jobs {folder}` shows how far")
    else:
        several = f"{len(request.members)} runs " if len(request.members) > 1 else ""
        ids = ", ".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))  # an array has one
        print(f"submitted {several}as job {ids}; {hint}")
    if args.wait:
        wait(folder)


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
    add_cluster_flags(parser)
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

"""`ov2 sweep`: many runs from one file, as one array of jobs; and a report of their results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from open_clip_ov2.argv import Parser, split, to_argv
from open_clip_ov2.commands.submit import carry_out
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.launch import cluster, report, state, submitted
from open_clip_ov2.launch.cluster import ClusterOptions, add_cluster_flags, given_flags
from open_clip_ov2.launch.folder import SLURM, Request, RunSpec
from open_clip_ov2.launch.sweep import Sweep, expand, load_sweep
from open_clip_ov2.tracking.text_table import on_console


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    sweep = load_sweep(args.file)
    folder = args.logs / sweep.name
    if args.report:
        show_report(folder, args.metric)
        return
    file = cluster.find_file(args.cluster)
    clusters = cluster.resolve(given_flags(args), file)
    specs = _without_submitted(folder, _planned(sweep, folder, after, clusters), args.retry)
    if not specs:
        print(f"{folder}: nothing to submit (--report shows the results)")
        return
    request = Request(
        title=sweep.name,
        executor=SLURM,
        command=("ov2", "sweep", *argv),
        cluster_file=str(file) if file else None,
        clusters=clusters,
        members=tuple(specs),
    )
    carry_out(folder.absolute(), request, args, f"`ov2 jobs {folder}` lists them")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 sweep",
        usage="ov2 sweep FILE.toml [flags] [-- FLAGS OF OV2 TRAIN]",
        description="Train a grid or list of runs on SLURM. The flags after `--` are for all of them.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.toml", help="what varies ([grid], [[run]]) and what does not ([base])")
    add("--logs", type=Path, default=Path("logs"), metavar="FOLDER", help="runs go to FOLDER/SWEEP (default: logs)")
    add("--dry-run", action="store_true", help="show the runs and the batch script; submit nothing")
    add("--retry", action="store_true", help="continue runs that failed, from their last checkpoints")
    add("--wait", action="store_true", help="wait until all runs are over; exit status 2 if one did not finish")
    add("--report", action="store_true", help="compare the runs: report.csv, .md and .png in the sweep's folder")
    add("--metric", default="caption_loss", help="for --report: a metric in results.jsonl")
    add_cluster_flags(parser)
    return parser


def _planned(sweep: Sweep, folder: Path, more: list[str], clusters: tuple[ClusterOptions, ...]) -> list[RunSpec]:
    """All runs of the sweep, checked. Raises UserError."""
    runs = []
    for run in expand(sweep):
        flags = [*to_argv(run.base), *more, *to_argv(run.own), "--logs", str(folder), "--name", run.name]
        with naming(run.name):
            runs.append(submitted.plan_run(flags, clusters, run.own))
    return runs


def _without_submitted(folder: Path, specs: list[RunSpec], retry: bool) -> list[RunSpec]:
    """Those that are to be submitted now; why the others are not is printed."""
    before, left = {run.run_dir.resolve(): run for run in state.find([folder])}, []
    for spec in specs:
        found = before.get(Path(spec.run_dir).resolve())
        if found is not None and (why := found.why_not(retry)):
            print(f"skipped   {spec.name}: {why}")
        else:
            left.append(spec)
    return left


def show_report(folder: Path, metric: str) -> None:
    rows = [report.row_of(run, metric) for run in state.find([folder])]
    if not rows:
        raise UserError(f"{folder}: no run of this sweep was submitted yet")
    Console().print(on_console(report.table(rows), box=None, pad_edge=False))
    for path in report.write_report(rows, metric, folder):
        print(f"wrote {path}")

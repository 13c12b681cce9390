"""`ov2 sweep`: many runs from one file, as one array of jobs; and what came of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.cluster_flags import add_cluster_flags, count_of, given_flags, split
from open_clip_ov2.commands.submit import wait
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import cluster, report, state, submit
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import SLURM
from open_clip_ov2.launch.plan import show_plan
from open_clip_ov2.launch.sweep import Sweep, expand, load_sweep
from open_clip_ov2.recipe.toml import flag_words


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
    work = _left_to_do(_work(sweep, folder, after, clusters), args.retry)
    if not work.members:
        print(f"{folder}: nothing to submit (--report makes the table)")
        return
    how = submit.How(
        executor=SLURM,
        clusters=clusters,
        command=("ov2", "sweep", *argv),
        argv=tuple(after),
        cluster_file=file,
        running_at_once=clusters[0].max_running,
    )
    show_plan(work, how)
    if args.dry_run:
        for name, text in submit.dry_run_texts(work, how).items():
            print(f"\n--- {name}\n{text}")
        print("dry run: nothing was written or submitted")
        return
    _, jobs = submit.submit(work, how)
    print(f"submitted {len(jobs)} runs as job {jobs[0].job_id.split('_')[0]}: `ov2 jobs --logs {folder}` lists them")
    if args.wait:
        wait(folder)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 sweep",
        usage="ov2 sweep FILE.toml [flags] [-- FLAGS OF OV2 TRAIN]",
        description="Train a grid or list of runs; --report compares them. Flags after `--` are for all of them.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.toml", help="what varies ([grid], [[run]]) and what does not ([base])")
    add("--logs", type=Path, default=Path("logs"), metavar="FOLDER", help="runs lie in FOLDER/SWEEP (default: logs)")
    add("--max-running", type=count_of("max_running"), metavar="N", help="how many run at once (default: 256)")
    add("--dry-run", action="store_true", help="show the runs and the sbatch file; submit nothing")
    add("--retry", action="store_true", help="go on with runs that failed, from their last checkpoints")
    add("--wait", action="store_true", help="until all are over; exit status 2 if one did not finish")
    add("--report", action="store_true", help="write report.csv, report.md and report.png into the sweep's folder")
    add("--metric", default="caption_loss", help="of the report; a name in results.jsonl (default: %(default)s)")
    add_cluster_flags(parser)
    return parser


def _work(sweep: Sweep, folder: Path, more: list[str], clusters: tuple[ClusterOptions, ...]) -> submit.Work:
    """All runs, checked. Raises UserError."""
    made = []
    for run in expand(sweep):
        place = ["--logs", str(folder), "--name", run.name]
        flags = [*flag_words(run.base), *more, *flag_words(run.own), *place]
        try:
            made.append(submit.member_of(flags, clusters, run.own))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
    members, checked = zip(*made, strict=True)
    return submit.Work(folder.absolute(), sweep.name, members, checked)


def _left_to_do(work: submit.Work, retry: bool) -> submit.Work:
    """Without the runs that are under way, or finished, or (unless --retry) failed; each is named."""
    before, left = submit.earlier(work), []
    for member, checked in zip(work.members, work.checked, strict=True):
        found = before.get(member.run_dir)
        if found is not None and (found.alive or found.state == state.FINISHED or not retry):
            hint = "" if found.alive or found.state == state.FINISHED else f": {found.reason}; --retry goes on"
            print(f"left out  {member.name}: {found.state}{hint}")
        else:
            left.append((member, checked))
    return submit.Work(work.folder, work.title, tuple(m for m, _ in left), tuple(c for _, c in left))


def show_report(folder: Path, metric: str) -> None:
    found = state.find([folder])
    if not found:
        raise UserError(f"{folder}: no run of this sweep was submitted yet")
    rows = report.rows(found, metric)
    header, lines = report.table(rows, metric)
    shown = Table(*header, box=None, pad_edge=False)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    for path in report.write_report(rows, metric, folder):
        print(path)

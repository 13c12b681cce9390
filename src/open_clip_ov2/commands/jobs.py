"""`ov2 jobs`: where submitted runs stand, and what to do with them."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch import state
from open_clip_ov2.launch.queue import cancel
from open_clip_ov2.launch.state import RunState

DESCRIPTION = """\
ov2 jobs                 all runs submitted from here: state, stage, samples, loss, images/s, restarts, why
ov2 jobs logs RUN        what a rank of it has printed
ov2 jobs cancel RUN      end it; what is saved stays
ov2 jobs resubmit RUN    the same run again, from its last checkpoint

RUN is a run's folder, or its name."""
STYLES = {
    state.RUNNING: "green", state.STARTING: "green", state.FINISHED: "bold green", state.QUEUED: "cyan",
    state.FAILED: "bold red", state.DIED: "bold red", state.CANCELLED: "yellow", state.STOPPED: "yellow",
}  # fmt: skip
SILENT_S = 600  # ours: a run that logs every 100 steps speaks up more often, so a hang shows here


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    logs = args.logs or [Path("logs")]
    if args.action is None:
        show(state.find(logs), args.json)
        return
    if args.run is None:
        raise UserError(f"ov2 jobs {args.action}: which run? (its folder or its name; `ov2 jobs` lists them)")
    run = state.of_run(args.run, logs)
    if args.action == "logs":
        print_log(run, args.rank, args.follow)
    elif args.action == "cancel":
        cancel_run(run)
    else:
        resubmit(run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 jobs", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("action", nargs="?", choices=("logs", "cancel", "resubmit"), help="default: list the runs")
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("--logs", type=Path, action="append", metavar="FOLDER", help="where runs lie (default: logs)")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="for logs (default: 0)")
    parser.add_argument("-f", "--follow", action="store_true", help="for logs: go on printing")
    parser.add_argument("--json", action="store_true", help="for the list")
    return parser


def show(runs: list[RunState], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_record(run) for run in runs], indent=1))
        return
    if not runs:
        print("no submitted runs here (`ov2 submit --help`; --logs says where to look)")
        return
    console = Console()
    table = Table("run", "job", "state", "stage", "samples", "loss", "images/s", "restarts", box=None, pad_edge=False)
    for run in runs:
        table.add_row(*_row(run))
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(
                f"{run.member.name}: {run.state}: {run.reason}", markup=False, highlight=False, soft_wrap=True
            )


def _row(run: RunState) -> tuple[str, ...]:
    status = run.status
    name, shown = run.member.name, f"[{STYLES[run.state]}]{run.state}[/]"
    if status is None:
        return name, run.job_id, shown, "", f"0 / {run.member.total_samples:,}", "", "", ""
    samples = f"{status.samples_seen:,} / {run.member.total_samples:,}"
    loss = "" if status.loss is None else f"{status.loss:.3f}"
    speed = "" if status.images_per_second is None or not run.alive else f"{status.images_per_second:,.0f}"
    stage = f"{status.stage} of {run.member.stages}"
    if run.state == state.RUNNING and time.time() - status.updated > SILENT_S:
        shown += f" (silent {(time.time() - status.updated) / 60:.0f} min)"
    return name, run.job_id, shown, stage, samples, loss, speed, str(status.restarts)


def _record(run: RunState) -> dict[str, object]:
    return {
        "name": run.member.name,
        "run_dir": run.member.run_dir,
        "job_id": run.job_id,
        "state": run.state,
        "reason": run.reason,
        "submission": str(run.submission.folder),
        "log": str(run.log() or ""),
        "status": asdict(run.status) if run.status is not None else None,
    }


def print_log(run: RunState, rank: int, follow: bool) -> None:
    path = run.log(rank)
    if path is None:
        raise UserError(f"{run.run_dir}: rank {rank} has no log yet ({run.state}; {run.submission.logs})")
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(path)])
    print(f"{path}:\n{path.read_text(errors='replace')}", end="")


def cancel_run(run: RunState) -> None:
    if not run.alive:
        raise UserError(f"{run.run_dir}: nothing to cancel, it has {run.state}")
    run.submission.note_cancelled(run.index)
    cancel(run.request.executor, [job.job_id for job in reversed(run.jobs)])
    print(f"{run.run_dir}: cancelled")


def resubmit(run: RunState) -> None:
    """The same command and cluster, with the code as it is now."""
    from open_clip_ov2.launch import submit
    from open_clip_ov2.launch.folder import DEBUG

    if run.request.executor == DEBUG:
        raise UserError(f"{run.run_dir}: was run by --debug; run the same command again")
    if not submit.check_again(run, retry=True):
        return
    os.chdir(run.request.cwd)  # paths in its command are seen from there
    work, how = submit.again(run)
    _, jobs = submit.submit(work, how)
    print(f"submitted as job {', '.join(job.job_id for job in jobs)}")

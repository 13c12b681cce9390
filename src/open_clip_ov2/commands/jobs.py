"""`ov2 jobs`: the state of submitted runs; their logs; cancel and resubmit them."""

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
ov2 jobs                 list the submitted runs: state, stage, samples, loss, images/s, restarts, why one failed
ov2 jobs logs RUN        print the log of a rank
ov2 jobs cancel RUN      end the run; its checkpoints stay
ov2 jobs resubmit RUN    submit the same run again; it continues from its last checkpoint

RUN is a run's folder or name."""
_STYLES = {
    state.RUNNING: "green", state.STARTING: "green", state.FINISHED: "bold green", state.QUEUED: "cyan",
    state.FAILED: "bold red", state.DIED: "bold red", state.CANCELLED: "yellow", state.STOPPED: "yellow",
}  # fmt: skip
_SILENT_S = 600  # ours: a healthy run updates its status more often, so a longer silence may be a hang


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    logs = args.logs or [Path("logs")]
    if args.action is None:
        show(state.find(logs), args.json)
        return
    if args.run is None:
        raise UserError(f"ov2 jobs {args.action}: RUN is missing: a run's folder or name (`ov2 jobs` lists them)")
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
    parser.add_argument(
        "--logs", type=Path, action="append", metavar="FOLDER", help="folder of the runs (default: logs)"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="the rank whose log is printed (default: 0)")
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing the log as it grows")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    return parser


def show(runs: list[RunState], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_record(run) for run in runs], indent=1))
        return
    if not runs:
        print("no submitted runs here (`ov2 submit` makes one; --logs FOLDER looks elsewhere)")
        return
    console = Console()
    table = Table("run", "job", "state", "stage", "samples", "loss", "images/s", "restarts", box=None, pad_edge=False)
    for run in runs:
        table.add_row(*_row(run))
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(f"{run.spec.name}: {run.state}: {run.reason}", markup=False, highlight=False, soft_wrap=True)


def _row(run: RunState) -> tuple[str, ...]:
    status, total = run.status, f"{run.spec.total_samples:,}"
    name, shown = run.spec.name, f"[{_STYLES[run.state]}]{run.state}[/]"
    if status is None:
        return name, run.job_id, shown, "", f"0 / {total}", "", "", ""
    loss = "" if status.loss is None else f"{status.loss:.3f}"
    speed = "" if status.images_per_second is None or not run.alive else f"{status.images_per_second:,.0f}"
    silent_s = time.time() - status.updated
    if run.state == state.RUNNING and silent_s > _SILENT_S:
        shown += f" (silent for {silent_s / 60:.0f} min)"
    stage, samples = f"{status.stage} of {run.spec.stages}", f"{status.samples_seen:,} / {total}"
    return name, run.job_id, shown, stage, samples, loss, speed, str(status.restarts)


def _record(run: RunState) -> dict[str, object]:
    return {
        "name": run.spec.name,
        "run_dir": run.spec.run_dir,
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
        raise UserError(f"{run.run_dir}: rank {rank} has no log in {run.submission.logs}; the run is {run.state}")
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(path)])
    print(f"{path}:\n{path.read_text(errors='replace')}", end="")


def cancel_run(run: RunState) -> None:
    if not run.alive:
        raise UserError(f"{run.run_dir}: nothing to cancel; the state of the run is: {run.state}")
    run.submission.mark_cancelled(run.index)
    cancel(run.request.executor, [job.job_id for job in reversed(run.jobs)])
    print(f"{run.run_dir}: cancelled")


def resubmit(run: RunState) -> None:
    """Submit the same command for the same cluster again, with the code as it is now."""
    from open_clip_ov2.launch import submit  # imports torch
    from open_clip_ov2.launch.folder import DEBUG

    if run.request.executor == DEBUG:
        raise UserError(f"{run.run_dir}: it was started with --debug; run the same command again")
    if not submit.needs_submission(run, retry=True):
        return
    os.chdir(run.request.cwd)  # paths in its flags are relative to it
    print(f"submitted as job {', '.join(job.job_id for job in submit.resubmit(run))}")

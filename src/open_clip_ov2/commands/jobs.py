"""`ov2 jobs`: the state of runs; logs of submitted ones; cancel and resubmit them."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError, nearest
from open_clip_ov2.launch import state
from open_clip_ov2.launch.folder import DEBUG, RunSpec
from open_clip_ov2.launch.queue import cancel
from open_clip_ov2.launch.state import RunState
from open_clip_ov2.tracking import status as run_status
from open_clip_ov2.tracking.status import Status, read_status

DESCRIPTION = """\
ov2 jobs [FOLDER]        list runs: state, stage, samples, loss, images/s, restarts, why one failed
ov2 jobs logs RUN        print the log of a rank
ov2 jobs cancel RUN      end the run; its checkpoints stay
ov2 jobs resubmit RUN    submit the same run again; it continues from its last checkpoint

FOLDER is that of a run, of a sweep or of many runs (default: logs), RUN a run's folder or name."""
_ACTIONS = ("logs", "cancel", "resubmit")
_STYLES = {
    state.RUNNING: "green", state.STARTING: "green", state.FINISHED: "bold green", state.QUEUED: "cyan",
    state.FAILED: "bold red", state.DIED: "bold red", state.CANCELLED: "yellow", state.STOPPED: "yellow",
    run_status.INTERRUPTED: "yellow",
}  # fmt: skip
_SILENT_S = 600  # ours: a healthy run updates its status more often, so a longer silence may be a hang


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    logs = args.logs or [Path("logs")]
    a_folder = args.run is None and args.action is not None and Path(args.action).is_dir()  # also one called "logs"
    if a_folder or args.action not in _ACTIONS:
        folders = [Path(args.action)] if args.action else logs
        _check_folders(folders if args.action or args.logs else [], args.action)
        submitted = state.find(folders)
        rows = [*map(_row_of, submitted), *_started_by_hand(folders, submitted)]
        if args.json:
            print(json.dumps([_record(row) for row in rows], indent=1))
        elif rows:
            show(rows)
        else:
            where = ", ".join(map(str, folders))
            print(f"no runs in {where} (`ov2 train` and `ov2 submit` make them; `ov2 jobs FOLDER` looks elsewhere)")
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
    add, actions = parser.add_argument, ", ".join(_ACTIONS)
    add("action", nargs="?", metavar="ACTION|FOLDER", help=f"{actions}; default: list the runs of FOLDER")
    add("run", nargs="?", metavar="RUN", help="a run's folder or name")
    add("--logs", type=Path, action="append", metavar="FOLDER", help="folder of the runs (default: logs)")
    add("--rank", type=int, default=0, metavar="N", help="the rank whose log is printed (default: 0)")
    add("-f", "--follow", action="store_true", help="keep printing the log as it grows")
    add("--json", action="store_true", help="print the list as JSON")
    return parser


def _check_folders(folders: Sequence[Path], action: str | None) -> None:
    for folder in folders:
        if not folder.is_dir():
            hint = f", and no action of this name{nearest(action, _ACTIONS)}" if action else ""
            raise UserError(f"{folder}: no such folder{hint} (actions: {', '.join(_ACTIONS)})")


class _Row(NamedTuple):
    """A run in the list. Of one that nobody submitted, `job_id`, `submission` and `log` are empty."""

    spec: RunSpec
    job_id: str
    state: str
    reason: str
    submission: str
    log: str
    status: Status | None


def _row_of(run: RunState) -> _Row:
    log = str(run.log() or "")
    return _Row(run.spec, run.job_id, run.state, run.reason, str(run.submission.folder), log, run.status)


def _started_by_hand(folders: Sequence[Path], submitted: Sequence[RunState]) -> list[_Row]:
    """Runs of `ov2 train` in the same places that nobody submitted."""
    known = {run.run_dir.resolve() for run in submitted}
    found: dict[Path, _Row] = {}
    for folder in folders:
        for path in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
            own, status = path.resolve(), read_status(path)
            if status is not None and own not in known:
                spec = RunSpec(own.name, str(own), (), "", status.stages, status.total_samples)
                found[own] = _Row(spec, "", status.state, status.reason, "", "", status)
    return list(found.values())


def _record(row: _Row) -> dict[str, Any]:
    shown = {name: getattr(row, name) for name in ("job_id", "state", "reason", "submission", "log")}
    status = row.status and asdict(row.status)
    return {"name": row.spec.name, "run_dir": row.spec.run_dir, **shown, "status": status}


def show(rows: Sequence[_Row]) -> None:
    console = Console()
    table = Table("run", "job", "state", "stage", "samples", "loss", "images/s", "restarts", box=None, pad_edge=False)
    for row in rows:
        table.add_row(escape(row.spec.name), row.job_id if row.submission else "by hand", *_cells(row))
    console.print(table)
    for row in rows:
        if row.reason:
            line = f"{row.spec.name}: {row.state}: {row.reason}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(row: _Row) -> tuple[str, ...]:
    status, total = row.status, row.spec.total_samples
    shown = f"[{_STYLES[row.state]}]{row.state}[/]"
    if status is None:
        return shown, "", f"0 / {total:,}" if total else "", "", "", ""
    loss = "" if status.loss is None else f"{status.loss:.3f}"
    over = status.images_per_second is None or row.state not in state.ALIVE
    speed = "" if over else f"{status.images_per_second:,.0f}"
    silent_s = time.time() - status.updated
    if row.state == state.RUNNING and silent_s > _SILENT_S:
        shown += f" (silent for {silent_s / 60:.0f} min)"
    samples = f"{status.samples_seen:,} / {total:,}" if total else f"{status.samples_seen:,}"
    return shown, f"{status.stage} of {row.spec.stages}", samples, loss, speed, str(status.restarts)


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

    if run.request.executor == DEBUG:
        raise UserError(f"{run.run_dir}: it was started with --debug; run the same command again")
    if submit.is_over(run, retry=True):
        return
    os.chdir(run.request.cwd)  # paths in its flags are relative to it
    print(f"submitted as job {', '.join(job.job_id for job in submit.resubmit(run))}")

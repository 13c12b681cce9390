"""`ov2 jobs`: the state of runs; logs of submitted ones; cancel and resubmit them."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError, nearest
from open_clip_ov2.launch import state
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
        show(submitted, _started_by_hand(folders, submitted), folders, args.json)
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
    parser.add_argument(
        "action", nargs="?", metavar="ACTION|FOLDER", help=f"{', '.join(_ACTIONS)}; default: list the runs of FOLDER"
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder or name")
    parser.add_argument(
        "--logs", type=Path, action="append", metavar="FOLDER", help="folder of the runs (default: logs)"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="the rank whose log is printed (default: 0)")
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing the log as it grows")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    return parser


def _check_folders(folders: Sequence[Path], action: str | None) -> None:
    for folder in folders:
        if not folder.is_dir():
            hint = f", and no action of this name{nearest(action, _ACTIONS)}" if action else ""
            raise UserError(f"{folder}: no such folder{hint} (actions: {', '.join(_ACTIONS)})")


def _started_by_hand(folders: Sequence[Path], submitted: Sequence[RunState]) -> dict[Path, Status]:
    """Runs of `ov2 train` in the same places that nobody submitted."""
    known = {run.run_dir.resolve() for run in submitted}
    found = {}
    for folder in folders:
        for path in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
            status = read_status(path)
            if status is not None and path.resolve() not in known:
                found[path.resolve()] = status
    return found


def show(submitted: Sequence[RunState], by_hand: Mapping[Path, Status], folders: Sequence[Path], as_json: bool) -> None:
    if as_json:
        others = [_record_by_hand(path, status) for path, status in by_hand.items()]
        print(json.dumps([*(_record(run) for run in submitted), *others], indent=1))
        return
    if not submitted and not by_hand:
        where = ", ".join(map(str, folders))
        print(f"no runs in {where} (`ov2 train` and `ov2 submit` make them; `ov2 jobs FOLDER` looks elsewhere)")
        return
    console = Console()
    table = Table("run", "job", "state", "stage", "samples", "loss", "images/s", "restarts", box=None, pad_edge=False)
    for run in submitted:
        spec = run.spec
        table.add_row(
            escape(spec.name), run.job_id, *_row(run.state, run.status, spec.stages, spec.total_samples, run.alive)
        )
    for path, status in by_hand.items():
        alive = status.state == run_status.RUNNING
        table.add_row(
            escape(path.name), "by hand", *_row(status.state, status, status.stages, status.total_samples, alive)
        )
    console.print(table)
    reasons = [(run.spec.name, run.state, run.reason) for run in submitted]
    reasons += [(path.name, status.state, status.reason) for path, status in by_hand.items()]
    for name, now, reason in reasons:
        if reason:
            console.print(f"{name}: {now}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _row(now: str, status: Status | None, stages: int, total: int, alive: bool) -> tuple[str, ...]:
    shown = f"[{_STYLES[now]}]{now}[/]"
    if status is None:
        return shown, "", f"0 / {total:,}" if total else "", "", "", ""
    loss = "" if status.loss is None else f"{status.loss:.3f}"
    speed = "" if status.images_per_second is None or not alive else f"{status.images_per_second:,.0f}"
    silent_s = time.time() - status.updated
    if now == state.RUNNING and silent_s > _SILENT_S:
        shown += f" (silent for {silent_s / 60:.0f} min)"
    samples = f"{status.samples_seen:,} / {total:,}" if total else f"{status.samples_seen:,}"
    return shown, f"{status.stage} of {stages}", samples, loss, speed, str(status.restarts)


def _record_by_hand(path: Path, status: Status) -> dict[str, object]:
    """As _record has it, without what a submission adds."""
    return {
        "name": path.name,
        "run_dir": str(path),
        "job_id": "",
        "state": status.state,
        "reason": status.reason,
        "submission": "",
        "log": "",
        "status": asdict(status),
    }


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

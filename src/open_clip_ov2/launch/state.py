"""The state of submitted runs, from the queue and from their status.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.folder import LOCAL, SLURM, SUBMIT, Job, Request, RunSpec, Submission, submissions
from open_clip_ov2.launch.queue import COMPLETING, PENDING, UNKNOWN, QueueJob, look_up
from open_clip_ov2.tracking import status as run_status
from open_clip_ov2.tracking.status import Status, read_status

QUEUED, STARTING, RUNNING, FINISHED = "queued", "starting", "running", "finished"
FAILED, CANCELLED, DIED, STOPPED = "failed", "cancelled", "died", "stopped"
ALIVE = (QUEUED, STARTING, RUNNING)


@dataclass(frozen=True)
class RunState:
    """One run now. `submission` is its newest one, `jobs` are those of that submission, `index` is the run's place in
    it; `reason`: why the run waits, failed or died."""

    spec: RunSpec
    request: Request
    submission: Submission
    jobs: tuple[Job, ...]
    index: int
    state: str
    reason: str
    job_id: str
    status: Status | None

    @property
    def run_dir(self) -> Path:
        return Path(self.spec.run_dir)

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def why_not(self, retry: bool) -> str:
        """Why this run is not to be submitted again; empty if it is, which takes `retry`."""
        if self.alive:
            return f"{self.state} already, as job {self.job_id} (see `ov2 jobs`)"
        if self.state == FINISHED:
            return f"finished already ({self.status.samples_seen if self.status else 0:,} samples)"
        return "" if retry else f"{self.state}: {self.reason}; --retry continues from its last checkpoint"

    def log(self, rank: int = 0) -> Path | None:
        """The newest log of a rank, or submitit's own log if the rank has not opened one yet."""
        logs = self.submission.logs
        found = sorted(logs.glob(f"{self.job_id}.rank{rank}.restart*.log"), key=lambda path: path.stat().st_mtime)
        early = logs / f"{self.job_id}_{rank}_log.out"
        return found[-1] if found else early if early.is_file() else None


def find(folders: Iterable[Path]) -> list[RunState]:
    """All submitted runs in these folders (of a run, of a sweep, or one that holds those), each once."""
    paths = (path for folder in folders for path in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))))
    newest: dict[Path, tuple[Request, Submission, int]] = {}
    for root in dict.fromkeys(path.resolve() for path in paths if (path / SUBMIT).is_dir()):
        for submission in submissions(root):
            request = submission.request()
            for index, spec in enumerate(request.members):
                run = Path(spec.run_dir).resolve()
                if run not in newest or newest[run][0].created < request.created:
                    newest[run] = (request, submission, index)
    jobs = {run: [job for job in one.jobs() if job.member == index] for run, (_, one, index) in newest.items()}
    queue: dict[str, QueueJob] = {}
    for executor in (LOCAL, SLURM):  # one question to each
        asked = (jobs[run] for run, (request, _, _) in newest.items() if request.executor == executor)
        queue |= look_up(executor, [job.job_id for own in asked for job in own])
    found = []
    for run, (request, submission, index) in newest.items():
        spec, status = request.members[index], read_status(run)
        rows = [queue.get(job.job_id, QueueJob(job.job_id, UNKNOWN)) for job in jobs[run]]
        now = state_of(rows, status, spec.stages, submission.is_cancelled(index))
        found.append(RunState(spec, request, submission, tuple(jobs[run]), index, *now, status))
    return found


def of_run(name: str, folders: Iterable[Path]) -> RunState:
    """The run in the folder `name`, or of that name in one of the folders. Raises UserError."""
    path = Path(name).resolve()
    found = find([path] if path.is_dir() else folders)
    hits = [state for state in found if state.run_dir.resolve() == path or state.spec.name == name]
    if len(hits) != 1:
        known = ", ".join(state.spec.name for state in found) or "none"
        problem = "no submitted run" if not hits else f"{len(hits)} runs have this name; give the folder"
        raise UserError(f"{name}: {problem} (known: {known}; --logs FOLDER looks elsewhere)")
    return hits[0]


def state_of(rows: list[QueueJob], status: Status | None, stages: int, cancelled: bool) -> tuple[str, str, str]:
    """(state, reason, id of the job that they are about) of a run, from its jobs in order and its own status."""
    status = status or Status("")
    done = status.state == run_status.FINISHED and status.stage >= stages
    failed = status.state == run_status.FAILED
    for row in sorted((row for row in rows if row.alive), key=lambda row: row.state == PENDING):
        mine = status.job_id == row.job_id
        if row.state == COMPLETING and mine and (done or failed):
            continue
        if row.state == PENDING:
            return QUEUED, row.why, row.job_id
        return (RUNNING if mine and status.state == run_status.RUNNING else STARTING), "", row.job_id
    job_id = next((row.job_id for row in rows if row.job_id == status.job_id), rows[-1].job_id if rows else "")
    if done:
        return FINISHED, "", job_id
    if cancelled:
        return CANCELLED, "by `ov2 jobs cancel`", job_id
    if failed:
        return FAILED, status.reason, job_id
    ended = next((row.state for row in rows if row.job_id == job_id), UNKNOWN)
    if ended == "CANCELLED":
        return CANCELLED, "by scancel or by SLURM", job_id
    if status.state in (run_status.FINISHED, run_status.INTERRUPTED):
        return STOPPED, status.reason or f"as asked, after stage {status.stage} of {stages}", job_id
    if not rows:
        return DIED, "it was never submitted", ""
    end = "SLURM no longer knows its job" if ended == UNKNOWN else f"its job ended as {ended}"
    return DIED, f"{end}, and the run recorded no reason; see `ov2 jobs logs`", job_id

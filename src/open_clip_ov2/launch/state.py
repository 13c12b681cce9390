"""Where runs stand: what the queue says, and what they say of themselves, made one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.folder import SUBMIT, Job, Member, Request, Submission, submissions
from open_clip_ov2.launch.queue import COMPLETING, PENDING, UNKNOWN, QueueJob, look_up
from open_clip_ov2.tracking import status as run_status
from open_clip_ov2.tracking.status import Status, read_status

QUEUED, STARTING, RUNNING, FINISHED = "queued", "starting", "running", "finished"
FAILED, CANCELLED, DIED, STOPPED = "failed", "cancelled", "died", "stopped"
ALIVE = (QUEUED, STARTING, RUNNING)


@dataclass(frozen=True)
class RunState:
    """One run as of now. `reason`: why it waits, failed, died. `jobs`: those of its newest submission;
    `index` is the member's."""

    member: Member
    request: Request
    submission: Submission
    jobs: tuple[Job, ...]
    index: int
    job_id: str
    state: str
    reason: str
    status: Status | None

    @property
    def run_dir(self) -> Path:
        return Path(self.member.run_dir)

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    def log(self, rank: int = 0) -> Path | None:
        """The newest log of a rank; submitit's own where the rank has not come so far."""
        logs = self.submission.logs
        found = sorted(logs.glob(f"{self.job_id}.rank{rank}.restart*.log"), key=lambda path: path.stat().st_mtime)
        early = logs / f"{self.job_id}_{rank}_log.out"
        return found[-1] if found else early if early.is_file() else None


def find(folders: Iterable[Path]) -> list[RunState]:
    """All runs that were submitted and lie in these folders (run, sweep, or folder of them), each once."""
    roots: dict[Path, None] = {}
    for folder in folders:
        for path in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
            if (path / SUBMIT).is_dir():
                roots[path.absolute()] = None
    newest: dict[str, tuple[Submission, Request, int]] = {}
    for root in roots:
        for submission in submissions(root):
            request = submission.request()
            for index, member in enumerate(request.members):
                before = newest.get(member.run_dir)
                if before is None or before[1].created < request.created:
                    newest[member.run_dir] = (submission, request, index)
    return _states(list(newest.values()))


def of_run(name: str, folders: Iterable[Path]) -> RunState:
    """By its folder, or by its name in one of the folders. Raises UserError."""
    path = Path(name).absolute()
    found = find([path] if path.is_dir() else folders)
    hits = [state for state in found if state.run_dir == path or state.member.name == name]
    if len(hits) != 1:
        known = ", ".join(state.member.name for state in found) or "none"
        what = "no submitted run" if not hits else f"{len(hits)} runs of that name; give the folder"
        raise UserError(f"{name}: {what} (there are: {known}; --logs says where to look)")
    return hits[0]


def _states(found: list[tuple[Submission, Request, int]]) -> list[RunState]:
    jobs = [(submission.jobs(), request.executor) for submission, request, _ in found]
    queue: dict[str, QueueJob] = {}
    for executor in {kind for _, kind in jobs}:
        queue |= look_up(executor, (job.job_id for own, kind in jobs if kind == executor for job in own))
    out = []
    for (submission, request, index), (all_jobs, _) in zip(found, jobs, strict=True):
        own = tuple(job for job in all_jobs if job.member == index)
        out.append(_state(submission, request, index, own, queue))
    return out


def _state(
    submission: Submission, request: Request, index: int, jobs: tuple[Job, ...], queue: Mapping[str, QueueJob]
) -> RunState:
    member = request.members[index]
    status = read_status(Path(member.run_dir))
    rows = [queue[job.job_id] for job in jobs]
    state, reason, job_id = judge(rows, status, member.stages, submission.cancelled(index))
    return RunState(member, request, submission, jobs, index, job_id, state, reason, status)


def judge(rows: list[QueueJob], status: Status | None, stages: int, cancelled: bool) -> tuple[str, str, str]:
    """(state, reason, id of the job that it is about) of a run, from its jobs in order and its own word."""
    done = status is not None and status.state == run_status.FINISHED and status.stage >= stages
    over = done or (status is not None and status.state == run_status.FAILED)
    for row in sorted((row for row in rows if row.alive), key=lambda row: row.state == PENDING):
        mine = status is not None and status.job_id == row.job_id
        if row.state == COMPLETING and mine and over:
            continue
        if row.state == PENDING:
            return QUEUED, row.why, row.job_id
        running = mine and status is not None and status.state == run_status.RUNNING
        return (RUNNING if running else STARTING), "", row.job_id
    last = next((row.job_id for row in rows if status is not None and row.job_id == status.job_id), "")
    job_id = last or (rows[-1].job_id if rows else "")
    if done:
        return FINISHED, "", job_id
    if cancelled:
        return CANCELLED, "by `ov2 jobs cancel`", job_id
    if status is not None and status.state == run_status.FAILED:
        return FAILED, status.reason, job_id
    ended = next((row.state for row in rows if row.job_id == job_id), UNKNOWN)
    if ended == "CANCELLED":
        return CANCELLED, "by SLURM or by hand", job_id
    if status is not None and status.state in (run_status.FINISHED, run_status.INTERRUPTED):
        said = status.reason or f"after stage {status.stage} of {stages}, as asked"
        return STOPPED, said, job_id
    if not rows:
        return DIED, "it was never submitted", ""
    told = "its job is gone" if ended == UNKNOWN else f"its job ended as {ended}"
    return DIED, f"{told}, and it said nothing; see `ov2 jobs logs`", job_id

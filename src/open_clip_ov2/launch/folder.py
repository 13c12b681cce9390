"""What lies in FOLDER/submit: one numbered folder for each submission, which says everything of it.

    submit/001/request.json    what was asked, resolved: flags, cluster, members
               command.txt     the exact command line
               jobs.json       ids of its jobs
               code/           the package as it was, which the job imports; edits made while it waits do not leak in
               git.txt         commit and difference, if the package lies in a git repository
               versions.txt    of Python and every package
               recipe/         the recipe's file
               sbatch*.sh      what SLURM got
               ends/           why ranks ended, where they had a reason; restarts after deaths
               logs/           one file for each job, rank and restart; submitit's own files

FOLDER is the run's, or a sweep's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.launch.cluster import ClusterOptions

SUBMIT = "submit"
REQUEST, JOBS, CANCELLED = "request.json", "jobs.json", "cancelled"
LOCAL, SLURM, DEBUG = "local", "slurm", "debug"


@dataclass(frozen=True)
class Member:
    """One run: `argv` of `ov2 train`, and what is known of it before it starts. `varied`: what a sweep varies."""

    name: str
    run_dir: str
    argv: tuple[str, ...]
    signature: str
    model: str
    stages: int
    total_samples: int
    varied: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One submission. `clusters`: one for each job of a chain of stages, else one. Members are in array order."""

    title: str
    executor: str
    command: tuple[str, ...]
    given_argv: tuple[str, ...]
    created: float
    user: str
    host: str
    cwd: str
    cluster_file: str | None
    clusters: tuple[ClusterOptions, ...]
    stage_jobs: bool
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Job:
    """`member` counts from 0; `stage` from 1 where stages are jobs of their own, else 0."""

    job_id: str
    member: int = 0
    stage: int = 0


class Submission:
    """A numbered folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def ends(self) -> Path:
        return self.folder / "ends"

    def discard(self) -> None:
        """Of a submission that came to nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in (self.folder.parent, self.folder.parent.parent):  # those that hold nothing else
            with contextlib.suppress(OSError):
                parent.rmdir()

    def write_request(self, request: Request) -> None:
        write_json(self.folder / REQUEST, asdict(request))

    def request(self) -> Request:
        values = json.loads((self.folder / REQUEST).read_text(encoding="utf-8"))
        values["clusters"] = tuple(ClusterOptions(**_tuples(cluster)) for cluster in values["clusters"])
        values["members"] = tuple(Member(**_tuples(member)) for member in values["members"])
        return Request(**_tuples(values))

    def write_jobs(self, jobs: Sequence[Job]) -> None:
        write_json(self.folder / JOBS, [asdict(job) for job in jobs])

    def cancelled(self, member: int) -> bool:
        """By `ov2 jobs cancel`: whoever asks why the run ended must not have to ask SLURM, which forgets."""
        return (self.folder / f"{CANCELLED}.{member}").is_file()

    def note_cancelled(self, member: int) -> None:
        (self.folder / f"{CANCELLED}.{member}").touch()

    def jobs(self) -> tuple[Job, ...]:
        """Empty until submitted."""
        try:
            return tuple(Job(**values) for values in json.loads((self.folder / JOBS).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return ()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists alone."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def submissions(folder: Path) -> list[Submission]:
    """Those of a run's or sweep's folder, oldest first."""
    found = [path for path in (folder / SUBMIT).glob("[0-9]*") if (path / REQUEST).is_file()]
    return [Submission(path) for path in sorted(found, key=lambda path: int(path.name))]


def new_submission(folder: Path) -> Submission:
    """The next number; two that submit at once get one each."""
    (folder / SUBMIT).mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in (folder / SUBMIT).glob("[0-9]*")), default=0)
    while True:
        number += 1
        path = folder / SUBMIT / f"{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return Submission(path.absolute())

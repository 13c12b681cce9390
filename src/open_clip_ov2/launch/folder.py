"""What lies in FOLDER/submit: one numbered folder for each submission. FOLDER is a run's or a sweep's.

submit/001/request.json    what was asked for: argv of each run, cluster options
           command.txt     the exact command line
           jobs.json       ids of the jobs
           code/           a copy of this package, which the job imports: later edits do not reach a waiting job
           git.txt         commit and uncommitted changes, if the package lies in a git repository
           versions.txt    versions of Python and all packages
           recipe/         a copy of the recipe
           sbatch*.sh      the batch scripts
           ends/           errors of ranks, and at which checkpoint ranks were lost
           logs/           one file for each job, rank and restart; submitit's own files
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.launch.cluster import ClusterOptions

SUBMIT = "submit"
REQUEST, JOBS, CANCELLED = "request.json", "jobs.json", "cancelled"
LOCAL, SLURM, DEBUG = "local", "slurm", "debug"  # executors
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class RunSpec:
    """One run: `argv` of `ov2 train`, and what is known before it starts. `varied`: the flags that a sweep varies."""

    name: str
    run_dir: str
    argv: tuple[str, ...]
    model: str
    stages: int
    total_samples: int
    varied: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    summaries: tuple[str, ...] = ()  # of its stages


@dataclass(frozen=True)
class Request:
    """One submission; its fields are the keys of request.json.

    `members` are the runs, in array order. `clusters` has one item for each stage with `stage_jobs`, else one.
    `command` is the whole command line.
    """

    title: str
    executor: str
    command: tuple[str, ...]
    cluster_file: str | None
    clusters: tuple[ClusterOptions, ...]
    members: tuple[RunSpec, ...]
    stage_jobs: bool = False
    created: float = field(default_factory=time.time)
    cwd: str = field(default_factory=os.getcwd)

    @property
    def stage_clusters(self) -> list[tuple[int, ClusterOptions]]:
        """(stage, cluster options) of each job of the chain; stage 0 is all stages in one job."""
        return list(enumerate(self.clusters, 1)) if self.stage_jobs else [(0, self.clusters[0])]


@dataclass(frozen=True)
class Job:
    """`member` is the index of its run; `stage` counts from 1 if stages are jobs of their own, else it is 0."""

    job_id: str
    member: int = 0
    stage: int = 0


class Submission:
    """A numbered folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs, self.code, self.exits = folder / "logs", folder / "code", folder / "ends"

    def discard(self) -> None:
        """Remove a submission that failed, and the folders above it that hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in (self.folder.parent, self.folder.parent.parent):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def write_request(self, request: Request) -> None:
        write_json(self.folder / REQUEST, asdict(request))

    def request(self) -> Request:
        values = read_json(self.folder / REQUEST, dict)
        values["clusters"] = [_loaded(ClusterOptions, cluster) for cluster in values["clusters"]]
        values["members"] = [_loaded(RunSpec, run) for run in values["members"]]
        return _loaded(Request, values)

    def write_jobs(self, jobs: Sequence[Job]) -> None:
        write_json(self.folder / JOBS, [asdict(job) for job in jobs])

    def jobs(self) -> tuple[Job, ...]:
        """Empty before the submission is done."""
        path = self.folder / JOBS
        return tuple(Job(**values) for values in read_json(path, list)) if path.is_file() else ()

    def is_cancelled(self, index: int) -> bool:
        """Whether `ov2 jobs cancel` ended the run. SLURM forgets its jobs, so a file remembers it."""
        return (self.folder / f"{CANCELLED}.{index}").is_file()

    def mark_cancelled(self, index: int) -> None:
        (self.folder / f"{CANCELLED}.{index}").touch()


def _loaded(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A dataclass from JSON, whose lists become tuples. Keys of other versions are ignored."""
    named = {item.name: values[item.name] for item in fields(kind) if item.name in values}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in named.items()})


def submissions(folder: Path) -> list[Submission]:
    """Submissions of a run or sweep, oldest first."""
    found = [path for path in (folder / SUBMIT).glob("[0-9]*") if (path / REQUEST).is_file()]
    return [Submission(path) for path in sorted(found, key=lambda path: int(path.name))]


def next_submission(folder: Path, make: bool = True) -> Submission:
    """The next numbered folder. Two commands that submit at the same time make one each."""
    while True:
        number = max((int(path.name) for path in (folder / SUBMIT).glob("[0-9]*")), default=0) + 1
        submission = Submission((folder / SUBMIT / f"{number:03d}").absolute())
        if not make:
            return submission
        submission.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            submission.folder.mkdir()
            submission.exits.mkdir()
            return submission

"""`ov2 captions write` as a job: an array of tasks that need not know of each other.

Each element of the array is a member of the submission with a folder of its own, which holds its status.json, so that
`ov2 jobs`, cancel, requeue and resubmit treat it as they treat a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.captions.write import Task
from open_clip_ov2.captions.write_options import parse_write, run_parsed
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.folder import RunSpec
from open_clip_ov2.tracking.status import StatusFile

COMMAND = ("captions", "write")
LOGS = Path("logs")  # where `ov2 jobs` looks
# A task that ends must not end the others of its job, which share nothing with it.
SRUN_ARGS = ("--kill-on-bad-exit=0",)


def is_captions(argv: Sequence[str]) -> bool:
    return tuple(argv[:1]) == COMMAND[:1]


def plan_captions(argv: Sequence[str], array: int = 1) -> list[RunSpec]:
    """Check a command line of `ov2 captions write` for so many elements of an array. Raises UserError."""
    if tuple(argv[:2]) != COMMAND:
        raise UserError(f"ov2 submit: after `--` come flags of `ov2 train`, or `captions write ...`, not {argv[:2]}")
    parsed = parse_write(argv[2:])
    if parsed.options.task is not None or parsed.options.status:
        raise UserError("ov2 submit: leave out --task and --status; each process gets its own shards")
    title = f"captions-{parsed.out.absolute().name}"
    names = [title] if array == 1 else [f"{title}-{element:03d}" for element in range(array)]
    folders = [LOGS / title if array == 1 else LOGS / title / name for name in names]
    return [
        RunSpec(
            name=name,
            run_dir=str(folder.absolute()),
            argv=tuple(argv),
            model=parsed.options.model or "the package's own model",
            stages=1,
            total_samples=0,
            summaries=(f"captions of {len(parsed.urls):,} shards into {parsed.out}",),
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def write_member(members: Sequence[RunSpec], element: int, rank: int, ranks: int) -> None:
    """The part of process `rank` of `ranks` in an element of the array. Raises as `write_captions` does."""
    task = Task(element * ranks + rank, ranks * len(members))
    write_as(members[element].argv, Path(members[element].run_dir), task, rank)


def write_as(argv: Sequence[str], run_dir: Path, task: Task, rank: int) -> None:
    """Write the shards of this process; rank 0 keeps the status of its member. Raises as `write_captions` does."""
    status, written = StatusFile(run_dir, active=rank == 0), 0
    status.update(stage=1, stages=1)

    def count(lines: int) -> None:
        nonlocal written
        written += lines
        status.update(samples_seen=written)

    with status.outcome():
        print(run_parsed(parse_write(argv[2:]), task, count), flush=True)

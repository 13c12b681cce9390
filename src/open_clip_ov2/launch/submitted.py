"""What a job runs: `ov2 train`, or a command that is named before its flags, `vlm train` or `captions write`.

`captions write` is an array of tasks that need not know of each other. Each element of the array is a member of the
submission with a folder of its own, so that `ov2 jobs`, cancel, requeue and resubmit treat it as they treat a run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2 import training, vlm
from open_clip_ov2.argv import is_given
from open_clip_ov2.captions.write_options import parse_write, write_set
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import RunSpec
from open_clip_ov2.recipe.costs import Checked
from open_clip_ov2.tracking.status import StatusFile
from open_clip_ov2.vlm.vlm_options import parse as parse_vlm

VLM, CAPTIONS = ("vlm", "train"), ("captions", "write")
LOGS = Path("logs")  # where `ov2 jobs` looks


def is_vlm(argv: Sequence[str]) -> bool:
    return tuple(argv[:2]) == VLM


def is_captions(argv: Sequence[str]) -> bool:
    return tuple(argv[:1]) == CAPTIONS[:1]


def check(argv: Sequence[str], world_size: int, gpus: bool, gpu_memory_gb: float | None = None) -> Checked:
    """Everything that can be checked before a run that trains. Raises UserError."""
    if is_vlm(argv):
        return vlm.check(argv[2:], world_size)
    return training.check(argv, world_size, gpus, gpu_memory_gb)


def plan_run(
    argv: Sequence[str], clusters: Sequence[ClusterOptions], varied: Mapping[str, Any] | None = None
) -> RunSpec:
    """Check the command line of a run for each of the clusters. Raises UserError for what would fail later."""
    if is_captions(argv):
        return plan_captions(argv)[0]
    settings = ((item.world_size, item.gpus_per_node > 0, item.gpu_memory_gb) for item in clusters)
    results = [check(argv, *each) for each in dict.fromkeys(settings)]
    if len({result.signature for result in results}) > 1:
        raise UserError(
            "--nodes differs between stages, and so the global batch does: give --global-batch, or a batch per stage"
        )
    checked = results[0]
    named = is_vlm(argv) or is_given(argv, "--name")
    return RunSpec(
        name=checked.name,
        run_dir=str(checked.run_dir.absolute()),
        # With its name it finds its run again, whatever changes in how a name is made.
        argv=tuple(argv) if named else (*argv, "--name", checked.name),
        model=checked.model,
        stages=len(checked.stages),
        total_samples=checked.total_samples,
        varied=dict(varied or {}),
        parameters=checked.parameters,
        summaries=checked.summaries,
    )


def plan_captions(argv: Sequence[str], array: int = 1) -> list[RunSpec]:
    """Check a command line of `ov2 captions write` for so many elements of an array. Raises UserError."""
    if tuple(argv[:2]) != CAPTIONS:
        raise UserError(f"ov2 submit: after `--` come flags of `ov2 train`, or `captions write ...`, not {argv[:2]}")
    options = parse_write(argv[2:])
    if options.task is not None or options.status:
        raise UserError("ov2 submit: leave out --task and --status; each process gets its own shards")
    title = f"captions-{options.out.absolute().name}"
    names = [title] if array == 1 else [f"{title}/{title}-{element:03d}" for element in range(array)]
    return [
        RunSpec(
            name=Path(name).name,
            run_dir=str((LOGS / name).absolute()),
            argv=tuple(argv),
            model=options.model or "the package's own model",
            stages=1,
            total_samples=0,
            summaries=(f"captions of {len(options.urls):,} shards into {options.out}",),
        )
        for name in names
    ]


def load(argv: Sequence[str]) -> None:
    """Import what the run needs (seconds), so that it is at its own signal handlers at once."""
    if is_vlm(argv):
        vlm.load()
    else:
        training.load()


def run(argv: Sequence[str], run_dir: Path) -> None:
    """Run the command in this process, as one rank of it. Raises UserError, RunFailed and Interrupted."""
    if is_captions(argv):
        _write_captions(argv, run_dir)
    elif is_vlm(argv):
        vlm.train(parse_vlm(argv[2:]))
    else:
        training.train(argv)


def _write_captions(argv: Sequence[str], run_dir: Path) -> None:
    """Write the shards of this process; rank 0 keeps the status of its member."""
    status, written = StatusFile(run_dir, active=os.environ.get("RANK", "0") == "0"), 0
    status.update(stage=1, stages=1)

    def count(lines: int) -> None:
        nonlocal written
        written += lines
        status.update(samples_seen=written)

    with status.outcome():
        print(write_set(parse_write(argv[2:]), wrote=count), flush=True)


def stages_done(run_dir: Path) -> int:
    """How many stages, from the first on, have written their last checkpoint, or their model."""
    done = 0
    while (run_dir / "checkpoints" / f"stage_{done + 1}.pt").is_file() or (run_dir / "stages" / str(done + 1)).is_dir():
        done += 1
    return done


def newest_checkpoint(run_dir: Path) -> str:
    """The newest one by its time, below the run's folder; empty if there is none. It tells progress alone, so nothing
    is loaded."""
    patterns = (
        "checkpoints/stage_*.pt", "checkpoints/stage_*.dcp", "checkpoints/stage_*/*/complete.json",
        "stages/*/config.json",
    )  # fmt: skip
    found = [path for pattern in patterns for path in run_dir.glob(pattern)]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    return newest.name if newest.suffix in (".pt", ".dcp") else str(newest.parent.relative_to(run_dir))

"""What a job runs: `ov2 train`, or a command that is named before its flags (`vlm train`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2 import training, vlm
from open_clip_ov2.argv import is_given
from open_clip_ov2.recipe.costs import Checked

VLM = ("vlm", "train")


def is_vlm(argv: Sequence[str]) -> bool:
    return tuple(argv[:2]) == VLM


def check(argv: Sequence[str], world_size: int, gpus: bool, gpu_memory_gb: float | None = None) -> Checked:
    """Everything that can be checked before the job runs. Raises UserError."""
    if is_vlm(argv):
        return vlm.check(argv[2:], world_size)
    return training.check(argv, world_size, gpus, gpu_memory_gb)


def named(argv: Sequence[str], name: str) -> tuple[str, ...]:
    """`argv` that finds its run again, whatever changes in how a name is made."""
    return tuple(argv) if is_vlm(argv) or is_given(argv, "--name") else (*argv, "--name", name)


def load(argv: Sequence[str]) -> None:
    """Import what the run needs (seconds), so that it is at its own signal handlers at once."""
    if is_vlm(argv):
        vlm.load()
    else:
        training.load()


def run(argv: Sequence[str]) -> None:
    """Raises UserError, RunFailed and Interrupted."""
    if is_vlm(argv):
        vlm.train_command(argv[2:])
    else:
        training.train(argv)


def stage_is_done(run_dir: Path, stage: int) -> bool:
    """Whether the stage has written its last checkpoint, or its model."""
    return (run_dir / "checkpoints" / f"stage_{stage}.pt").is_file() or (run_dir / "stages" / str(stage)).is_dir()


def newest_checkpoint(run_dir: Path) -> str:
    """The newest one by its time, below the run's folder; empty if there is none. It tells progress alone, so nothing
    is loaded."""
    found = [*run_dir.glob("checkpoints/stage_*.pt"), *run_dir.glob("checkpoints/stage_*/*/complete.json")]
    found += run_dir.glob("checkpoints/stage_*.dcp")
    found += run_dir.glob("stages/*/config.json")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    return newest.name if newest.suffix in (".pt", ".dcp") else str(newest.parent.relative_to(run_dir))

"""All that a comparison knows of `ov2 train` and `ov2 eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.runlog.status import FINISHED, read_status


@dataclass(frozen=True)
class Known:
    """A run as `ov2 train` sees it: equal ones have one name, whichever comparison asks for them."""

    name: str
    run_dir: Path
    flops: tuple[float, ...]  # forward and backward of one image, by stage


def look_at(argv: Sequence[str], logs: Path) -> Known:
    """Parsed and checked, without training. Raises UserError."""
    from open_clip_ov2.seam.arguments import parse
    from open_clip_ov2.seam.memory import stage_flops

    plan = parse([*argv, "--logs", str(logs)], world_size=1)
    return Known(plan.name, plan.folder, tuple(stage_flops(stage) for stage in plan.stages))


def is_finished(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == FINISHED and status.stage == status.stages


def train_command(argv: Sequence[str], logs: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "train", *argv, "--logs", str(logs), "--name", name]


def eval_command(run_dir: Path, argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "eval", str(run_dir), *argv]

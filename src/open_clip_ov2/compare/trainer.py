"""All that a comparison knows of `ov2 train`, `ov2 eval` and the contenders of `ov2 bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.bench.cases import Case, Job
from open_clip_ov2.bench.machine import default_device
from open_clip_ov2.compare.config import Arm, Measure
from open_clip_ov2.errors import UserError
from open_clip_ov2.runlog.status import FINISHED, read_status

STOCK_WORDS = "ov2-vit-nano-8"  # has OpenCLIP's own vocabulary


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


def contender(arm: Arm, argv: Sequence[str], logs: Path, models: Sequence[str], measure: Measure, threads: int) -> Job:
    """The arm's last stage, as `ov2 bench` trains it. Captions are of the vocabulary of the first ov2 model among the
    comparison's `models`, or OpenCLIP's own. Raises UserError.
    """
    from open_clip_ov2.seam.arguments import parse
    from open_clip_ov2.seam.factory import is_family

    plan = parse([*argv, "--logs", str(logs)], world_size=1)
    args, options = plan.stages[-1].args, plan.stages[-1].options
    device = default_device()
    if measure.largest_batch and device == "cpu" and measure.memory_limit_gb is None:
        raise UserError("[measure] largest-batch on a CPU: say memory-limit-gb, up to which memory is counted")
    return Job(
        arm=arm.name,
        model=plan.model,
        words_of=next((name for name in models if is_family(name)), STOCK_WORDS),
        case=Case(arm.stages[-1].resolution, args.precision, args.batch_size),
        device=device,
        compile=args.torchcompile,
        memory_budget=options.activation_memory_budget,
        keep_ratio=options.keep_ratio.high if options.keep_ratio else None,
        lengths=measure.lengths,
        memory_limit_gb=measure.memory_limit_gb,
        threads=threads if device == "cpu" else None,
        tokenizer=options.tokenizer,
    )


def is_finished(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == FINISHED and status.stage == status.stages


def train_command(argv: Sequence[str], logs: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "train", *argv, "--logs", str(logs), "--name", name]


def eval_command(run_dir: Path, argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "eval", str(run_dir), *argv]

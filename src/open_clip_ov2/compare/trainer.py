"""All that a comparison knows of `ov2 train`, `ov2 eval` and the contenders of `ov2 bench`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.bench.cases import Case, Job
from open_clip_ov2.compare.bench.machine import default_device
from open_clip_ov2.compare.config import Arm, Measure
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.status import FINISHED, read_status

# What a table shows, or follows from that.
TOLD = ("model", "force_image_size", "train_num_samples", "epochs", "seed", "warmup", "caption_keys_given")
VALIDATION = ("--val-data", "--val-num-samples", "--val-every-samples", "--eval", "--eval-every-samples")
STOCK_WORDS = "ov2-vit-nano-8"  # has OpenCLIP's own vocabulary


@dataclass(frozen=True)
class Known:
    """A run as `ov2 train` sees it: equal ones have one name, whichever comparison asks for them."""

    name: str
    run_dir: Path
    flops: tuple[float, ...]  # forward and backward of one image, by stage
    config: Mapping[str, Any]  # what makes it this run (seam/run_config)


def look_at(argv: Sequence[str], logs: Path) -> Known:
    """Parsed and checked, without training. Raises UserError."""
    from open_clip_ov2.openclip.command.parse import parse
    from open_clip_ov2.openclip.run.stage_costs import stage_flops

    plan = parse([*argv, "--logs", str(logs)], world_size=1)
    return Known(plan.name, plan.folder, tuple(stage_flops(stage) for stage in plan.stages), plan.config)


def contender(
    arm: Arm, argv: Sequence[str], logs: Path, models: Sequence[str], measure: Measure, threads: int
) -> Job | str:
    """The arm's last stage as `ov2 bench` trains it; or why it cannot train it alike. Captions are of the vocabulary of
    the first ov2 model among the comparison's `models`, or OpenCLIP's own. Raises UserError.
    """
    from open_clip_ov2.openclip.command.parse import parse
    from open_clip_ov2.openclip.models.factory import is_ov2_model

    plan = parse([*argv, "--logs", str(logs)], world_size=1)
    args, options = plan.stages[-1].args, plan.stages[-1].options
    unknown = [flag for flag, given in _unknown_to_bench(args, plan.is_ov2).items() if given]
    if unknown:
        return f"`ov2 bench` has no {', '.join(unknown)}"
    device = "cpu" if args.device == "cpu" else default_device()
    if measure.largest_batch and device == "cpu" and measure.memory_limit_gb is None:
        raise UserError("[measure] largest-batch on a CPU: say memory-limit-gb, up to which memory is counted")
    return Job(
        arm=arm.name,
        model=plan.model,
        words_of=next((name for name in models if is_ov2_model(name)), STOCK_WORDS),
        case=Case(arm.stages[-1].resolution, args.precision, args.batch_size),
        device=device,
        compile=args.torchcompile,
        memory_budget=options.activation_memory_budget,
        keep_ratio=options.keep_ratio.high if options.keep_ratio else None,
        lengths=measure.lengths,
        memory_limit_gb=measure.memory_limit_gb,
        threads=threads if device == "cpu" else None,
        tokenizer=options.tokenizer,
        context_length=args.force_context_length,
        patch_dropout=args.force_patch_dropout,
        fusion=options.fusion,
        grad_checkpointing=args.grad_checkpointing,
    )


def _unknown_to_bench(args: Namespace, family: bool) -> dict[str, bool]:
    """Flags that change what a step holds; stock models keep the features of all micro-batches."""
    return {
        "--accum-freq": args.accum_freq > 1 and not family,
        "--opt": args.opt.lower() != "adamw",
        "--lock-image": args.lock_image,
        "--lock-text": args.lock_text,
        "--siglip": args.siglip,
        "--distill-model": args.distill_model is not None,
        "--use-bnb-linear": args.use_bnb_linear is not None,
        "--force-custom-text": args.force_custom_text,
    }


def unlike(one: Known, other: Known) -> tuple[str, ...]:
    """`flag value (the other's)`, of each flag of a stage that differs and that a comparison's table does not show."""
    out = {}
    for mine, theirs in zip(one.config["stages"], other.config["stages"], strict=False):
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key) and key not in TOLD:
                name = key.replace("_", "-")
                out[name] = f"{name} {_shown(mine.get(key))} ({_shown(theirs.get(key))})"
    return tuple(out.values())


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def validated_otherwise(run_dir: Path, argv: Sequence[str]) -> list[str]:
    """Flags of validation that a run was trained with other values of. Raises UserError."""
    file = run_dir / "run.json"
    try:
        then = json.loads(file.read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not what `ov2 train` writes ({error})") from None
    return [flag for flag in VALIDATION if _value(then, flag) != _value(argv, flag)]


def _value(words: Sequence[str], flag: str) -> str | None:
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises UserError."""
    from open_clip_ov2.evaluate.tasks import check_tasks as known

    known(",".join(tasks))


def is_finished(run_dir: Path) -> bool:
    status = read_status(run_dir)
    return status is not None and status.state == FINISHED and status.stage == status.stages


def train_command(argv: Sequence[str], logs: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "train", *argv, "--logs", str(logs), "--name", name]


def eval_command(run_dir: Path, argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "open_clip_ov2", "eval", str(run_dir), *argv]

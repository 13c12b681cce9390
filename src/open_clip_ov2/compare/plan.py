"""Which runs a comparison is made of: arms x seeds, each with its samples by stage, and the flags of `ov2 train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare.config import Arm, Comparison
from open_clip_ov2.errors import UserError

OPENCLIP_BATCH = 64  # OpenCLIP's default of --batch-size


@dataclass(frozen=True)
class Data:
    """What the command line gives: --train-data, --val-data, what probes are fitted to, more flags of `ov2 train`."""

    train: str
    val: str
    probe: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """`folder` gets the page and what it is made of; `logs` the runs, which comparisons share where they are equal."""

    comparisons: tuple[Comparison, ...]
    data: Data
    folder: Path
    logs: Path
    at_once: int
    command: str
    title: str


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `stage_samples` by stage; `argv` of `ov2 train`, without --logs and --name."""

    arm: Arm
    seed: int
    stage_samples: tuple[int, ...]
    argv: tuple[str, ...]


def arm_words(comparison: Comparison, arm: Arm, data: Data, stages: Sequence[tuple[int, int]]) -> list[str]:
    """`ov2 train` for an arm but for its seed; `stages` are (px, samples). An arm's flags win over all others."""
    common = {key: value for key, value in comparison.flags.items() if key not in arm.flags}
    told = [f"{resolution}:samples={samples}" for resolution, samples in stages]
    staged = [word for text in told for word in ("--stage", text)]
    given = ["--model", arm.model, "--train-data", data.train]
    return [*given, *to_argv(common), *data.more, *to_argv(arm.flags), *staged]


def global_batch(comparison: Comparison, arm: Arm) -> int:
    """Images of one step, which a stage's samples are a multiple of."""
    flags = {**comparison.flags, **arm.flags}
    if "global-batch" in flags:
        return int(flags["global-batch"])
    return int(flags.get("batch-size", OPENCLIP_BATCH)) * int(flags.get("accum-freq", 1))


def stage_samples(
    comparison: Comparison,
    arm: Arm,
    rates: Mapping[str, Sequence[float]],
    flops: Mapping[str, Sequence[float]],
) -> tuple[int, ...]:
    """Samples of each stage of an arm, to a whole batch.

    `rates`: images/s of each arm by stage (mode "seconds"); `flops`: FLOPs of an image, the same way (mode "flops").
    """
    total = comparison.budget
    if comparison.mode == "seconds":
        seconds_each = sum(s.share / rate for s, rate in zip(arm.stages, rates[arm.name], strict=True))
        total = comparison.budget / seconds_each
    elif comparison.mode == "flops":
        reference = comparison.arm(comparison.reference)
        total *= _mean(reference, flops[reference.name]) / _mean(arm, flops[arm.name])
    batch = global_batch(comparison, arm)
    return tuple(max(1, round(total * stage.share / batch)) * batch for stage in arm.stages)


def _mean(arm: Arm, by_stage: Sequence[float]) -> float:
    return sum(stage.share * value for stage, value in zip(arm.stages, by_stage, strict=True))


def runs(
    comparison: Comparison,
    data: Data,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    flops: Mapping[str, Sequence[float]],
) -> list[Run]:
    """All runs, seed by seed, so that one that is cut short still has every arm. Raises UserError."""
    out = []
    for seed in seeds:
        for arm in comparison.trained:
            counts = stage_samples(comparison, arm, rates, flops)
            stages = list(zip([stage.resolution for stage in arm.stages], counts, strict=True))
            argv = arm_words(comparison, arm, data, stages)
            argv += ["--val-data", data.val, "--seed", str(seed)]
            out.append(Run(arm, seed, counts, tuple(argv)))
    if not out:
        raise UserError(f"{comparison.name}: no arm is trained")
    return out


def seconds_at(samples: float, counts: Sequence[int], rates: Sequence[float]) -> float:
    """Seconds of training until so many samples, at the images/s measured for each stage."""
    seconds, left = 0.0, samples
    for count, rate in zip(counts, rates, strict=True):
        within = min(left, count)
        seconds += within / rate
        left -= within
    return seconds

"""The runs of a comparison: variants x seeds, each with its samples by stage and its flags of `ov2 train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare.config import Comparison
from open_clip_ov2.compare.parts import Variant
from open_clip_ov2.errors import UserError

OPENCLIP_BATCH = 64  # OpenCLIP's default of --batch-size
ByStage = Mapping[str, Sequence[float]]  # numbers of each variant, by stage


@dataclass(frozen=True)
class Study:
    """`train`, `val`, `probe`: data of training, of validation and evaluation, and what probes are fitted to; `more`:
    further flags of `ov2 train`. `folder` gets the page and what it is made of; `logs` the runs, which comparisons
    share if they are equal."""

    comparisons: tuple[Comparison, ...]
    train: str
    val: str
    probe: str
    more: tuple[str, ...]
    folder: Path
    logs: Path
    at_once: int = 1
    command: str = ""
    title: str = ""


@dataclass(frozen=True)
class Run:
    """One variant with one seed. `stage_samples` by stage; `argv` of `ov2 train`, without --name."""

    variant: Variant
    seed: int
    stage_samples: tuple[int, ...]
    argv: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


def train_argv(study: Study, comparison: Comparison, variant: Variant, stages: Sequence[tuple[int, int]]) -> list[str]:
    """Flags of `ov2 train` except the seed; `stages` are (px, samples). A variant's flags win over all others."""
    common = {name: value for name, value in comparison.flags.items() if name not in variant.flags}
    staged = [word for pixels, samples in stages for word in ("--stage", f"{pixels}:samples={samples}")]
    begin = ["--model", variant.model, "--train-data", study.train]
    return [*begin, *to_argv(common), *study.more, *to_argv(variant.flags), *staged]


def global_batch(comparison: Comparison, variant: Variant) -> int:
    """Images of one step; a stage's samples are a multiple of it."""
    flags = {**comparison.flags, **variant.flags}
    each = int(flags.get("batch-size", OPENCLIP_BATCH)) * int(flags.get("accum-freq", 1))
    return int(flags.get("global-batch", each))


def mean_over_stages(variant: Variant, by_stage: Sequence[float]) -> float:
    """A number of an image, as the mean over stages weighted by their shares of the samples."""
    return sum(stage.share * value for stage, value in zip(variant.stages, by_stage, strict=True))


def stage_samples(comparison: Comparison, variant: Variant, rates: ByStage, flops: ByStage) -> tuple[int, ...]:
    """Samples of each stage of a variant, to a whole batch.

    `rates`: images/s (mode "seconds"); `flops`: FLOPs of an image (mode "flops").
    """
    total = comparison.budget
    if variant.samples is not None:
        total = variant.samples
    elif comparison.mode == "seconds":
        total /= mean_over_stages(variant, [1 / rate for rate in rates[variant.name]])
    elif comparison.mode == "flops":
        reference = comparison.variant(comparison.reference)
        needed = mean_over_stages(reference, flops[reference.name])
        total *= needed / mean_over_stages(variant, flops[variant.name])
    batch = global_batch(comparison, variant)
    return tuple(max(1, round(total * stage.share / batch)) * batch for stage in variant.stages)


def runs(study: Study, comparison: Comparison, rates: ByStage, flops: ByStage) -> list[Run]:
    """All runs, seed by seed, so that a study that is cut short still has every variant. Raises UserError."""
    out = []
    for seed in comparison.seeds:
        for variant in comparison.trained:
            counts = stage_samples(comparison, variant, rates, flops)
            stages = [(stage.resolution, count) for stage, count in zip(variant.stages, counts, strict=True)]
            argv = train_argv(study, comparison, variant, stages)
            out.append(Run(variant, seed, counts, (*argv, "--val-data", study.val, "--seed", str(seed))))
    if not out:
        raise UserError(f"{comparison.name}: no variant is trained")
    return out

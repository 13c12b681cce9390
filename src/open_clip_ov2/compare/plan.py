"""The runs of a comparison: variants x seeds, each with its samples by stage and its flags of `ov2 train`.

Before them the learning rate of each variant that states no `lr` is searched: a whole run for each rate of [search],
with the first seed. The lowest loss wins: what the variant itself minimizes in training, over the last fifth of the
run, since no other loss is common to captioners and contrastive models. The winner is the first seed's run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare.config import Comparison, Variant

OPENCLIP_BATCH = 64  # OpenCLIP's default of --batch-size
LAST = 0.2  # of a run
TO_THE_END = ("--max-bad-steps", "1000000000")  # a rate at which training diverges loses, and stops nothing
ByStage = Mapping[str, Sequence[float]]  # numbers of each variant, by stage
Losses = Mapping[str, Mapping[float, float]]  # by variant and learning rate


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


def samples_of(comparison: Comparison, variant: Variant, rates: ByStage, flops: ByStage) -> float:
    """Samples of a run; `rates`: images/s (mode "seconds"); `flops`: FLOPs of an image (mode "flops")."""
    if variant.samples is not None:
        return variant.samples
    if comparison.mode == "seconds":
        return comparison.seconds / mean_over_stages(variant, [1 / rate for rate in rates[variant.name]])
    if comparison.mode == "flops":
        reference = next(one for one in comparison.variants if one.name == comparison.reference)
        needed = mean_over_stages(reference, flops[reference.name])
        return comparison.samples * needed / mean_over_stages(variant, flops[variant.name])
    return comparison.samples


def _run(study: Study, comparison: Comparison, variant: Variant, seed: int, samples: float) -> Run:
    """With so many samples, each stage's to a whole batch."""
    batch = global_batch(comparison, variant)
    counts = tuple(max(1, round(samples * stage.share / batch)) * batch for stage in variant.stages)
    stages = [(stage.resolution, count) for stage, count in zip(variant.stages, counts, strict=True)]
    argv = train_argv(study, comparison, variant, stages)
    return Run(variant, seed, counts, (*argv, "--val-data", study.val, "--seed", str(seed)))


def runs(study: Study, comparison: Comparison, rates: ByStage, flops: ByStage) -> list[Run]:
    """All runs, seed by seed, so that a study that is cut short still has every variant; see `samples_of`."""
    samples = {variant.name: samples_of(comparison, variant, rates, flops) for variant in comparison.trained}
    return [
        _run(study, comparison, variant, seed, samples[variant.name])
        for seed in comparison.seeds
        for variant in comparison.trained
    ]


def search_runs(study: Study, comparison: Comparison, rates: ByStage, flops: ByStage) -> list[tuple[str, float, Run]]:
    """Every run of the search, with its variant's name and its learning rate; see `samples_of`."""
    search = comparison.search
    if search is None:
        return []
    out = []
    for variant in comparison.trained:
        samples = samples_of(comparison, variant, rates, flops)
        for lr in () if "lr" in variant.flags else search.lr:
            tried = replace(variant, name=f"{variant.name}, lr {lr:g}", flags={**variant.flags, "lr": lr})
            run = _run(study, comparison, tried, comparison.seeds[0], samples)
            out.append((variant.name, lr, replace(run, argv=(*run.argv, *TO_THE_END))))
    return out


def final_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of a run's results.jsonl; infinite if it has diverged."""
    points = [(row["samples_seen"], row.get("loss")) for row in rows if row["kind"] == "train"]
    last = [loss for seen, loss in points if seen > (1 - LAST) * points[-1][0]]
    values = [math.inf if loss is None or not math.isfinite(loss) else loss for loss in last]
    return statistics.fmean(values) if values else math.inf


def best_rate(by_rate: Mapping[float, float]) -> float:
    """Of equal losses, the lower rate's."""
    return min(sorted(by_rate), key=by_rate.__getitem__)


def with_rates(comparison: Comparison, found: Losses) -> Comparison:
    """The comparison with the learning rates that won."""
    chosen = [
        replace(one, flags={**one.flags, "lr": best_rate(found[one.name])}) if one.name in found else one
        for one in comparison.variants
    ]
    return replace(comparison, variants=tuple(chosen))

"""The learning rate of each variant, searched with the same effort: a short run for each rate of the file.

Each run has a schedule of its own, as long as [search] says, and the first seed. The rate with the lowest loss wins:
the mean of what the variant itself minimizes over the last fifth of the run, in training, since no other loss is
common to captioners and contrastive models. A variant that states its own `lr` is not searched.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from open_clip_ov2.compare.config import Comparison
from open_clip_ov2.compare.parts import Variant
from open_clip_ov2.compare.plan import Run, Study, global_batch, train_argv

LAST = 0.2  # of a run's samples
Losses = Mapping[str, Mapping[float, float]]  # by variant and learning rate


def search_runs(study: Study, comparison: Comparison) -> list[tuple[Variant, float, Run]]:
    """Every run of the search."""
    search, out = comparison.search, []
    if search is None:
        return []
    for variant in comparison.trained:
        for lr in () if "lr" in variant.flags else search.lr:
            batch = global_batch(comparison, variant)
            counts = [max(1, round(search.samples * stage.share / batch)) * batch for stage in variant.stages]
            tried = replace(variant, name=f"{variant.name}, lr {lr:g}", flags={**variant.flags, "lr": lr})
            stages = [(stage.resolution, count) for stage, count in zip(variant.stages, counts, strict=True)]
            argv = train_argv(study, comparison, tried, stages)
            seed = comparison.seeds[0]
            out.append((variant, lr, Run(tried, seed, tuple(counts), (*argv, "--seed", str(seed)))))
    return out


def final_loss(rows: Sequence[Mapping[str, Any]]) -> float:
    """Of a run's results.jsonl; infinite if it has diverged."""
    points = [(row["samples_seen"], row.get("loss")) for row in rows if row["kind"] == "train"]
    last = [loss for seen, loss in points if seen > (1 - LAST) * points[-1][0]] if points else []
    values = [math.inf if loss is None or not math.isfinite(loss) else loss for loss in last]
    return statistics.fmean(values) if values else math.inf


def losses(tried: Sequence[tuple[Variant, float, Run]], rows: Callable[[Run], Sequence[Mapping[str, Any]]]) -> Losses:
    """`rows`: those of a run's results.jsonl."""
    found: dict[str, dict[float, float]] = {}
    for variant, lr, run in tried:
        found.setdefault(variant.name, {})[lr] = final_loss(rows(run))
    return found


def with_rates(comparison: Comparison, found: Losses) -> Comparison:
    """The comparison with the learning rates that won."""

    def chosen(variant: Variant) -> Variant:
        if variant.name not in found:
            return variant
        return replace(variant, flags={**variant.flags, "lr": best_rate(found[variant.name])})

    return replace(comparison, variants=tuple(map(chosen, comparison.variants)))


def best_rate(by_rate: Mapping[float, float]) -> float:
    """Of equal losses, the lower rate's."""
    return min(sorted(by_rate), key=by_rate.__getitem__)

"""What a comparison found, ready for tables, plots and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.config import Comparison, Metric
from open_clip_ov2.compare.plan import seconds_at
from open_clip_ov2.errors import UserError

Curve = tuple[tuple[float, float], ...]  # (samples seen, value)


@dataclass(frozen=True)
class Cost:
    """What a step of an arm costs, as `ov2 bench` found it; None where it was not asked."""

    step_memory_mb: float | None = None
    largest_batch: int | None = None


@dataclass(frozen=True)
class ArmResult:
    """One arm. `rates`: images/s by repetition over all its stages; `stage_rates` the medians by stage; `ratios`: rates
    over the reference's, by repetition. `unlike`: flags that differ from the reference's. `values` and `learning`: by
    metric, one for each seed."""

    name: str
    model: str
    trained: bool
    seeds: tuple[int, ...]
    stage_samples: tuple[int, ...]
    flops: float
    rates: tuple[float, ...]
    stage_rates: tuple[float, ...]
    ratios: tuple[float, ...]
    memory_mb: float
    cost: Cost
    unlike: tuple[str, ...]
    over: float | None
    values: Mapping[str, tuple[float, ...]]
    learning: Mapping[str, tuple[Curve, ...]]

    @property
    def samples(self) -> int:
        return sum(self.stage_samples)

    @property
    def seconds(self) -> float:
        """Of one run's training, at the images/s measured."""
        return seconds_at(self.samples, self.stage_samples, self.stage_rates)

    def seconds_at(self, samples: float) -> float:
        return seconds_at(samples, self.stage_samples, self.stage_rates)


@dataclass(frozen=True)
class Found:
    """One comparison with all its arms."""

    comparison: Comparison
    arms: tuple[ArmResult, ...]
    machine: str

    @property
    def trained(self) -> tuple[ArmResult, ...]:
        return tuple(arm for arm in self.arms if arm.trained)


@dataclass(frozen=True)
class Summary:
    """Over seeds. `sd` (of a sample, n - 1) is None for one seed."""

    mean: float
    sd: float | None
    n: int


def summary(values: Sequence[float]) -> Summary | None:
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def flatten(found: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested tables by dotted path; a list's items by their index."""
    return dict(_leaves(found, prefix))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def read_evaluations(paths: Sequence[Path], names: Sequence[str]) -> dict[str, float]:
    """The numbers of several files of `ov2 eval --out`, each under its name where it has one. Raises UserError."""
    out: dict[str, float] = {}
    for path, name in zip(paths, names, strict=True):
        try:
            found = flatten(json.loads(path.read_text(encoding="utf-8")), name)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no result of `ov2 eval` ({error}); remove it to evaluate again") from error
        twice = next(iter(found.keys() & out.keys()), None)
        if twice:
            raise UserError(
                f"two [[evaluate]] give {twice}: give one of them a name, which then begins its metrics' keys"
            )
        out |= found
    return out


def by_metric(metrics: Sequence[Metric], found: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """The values of each metric over an arm's seeds; a metric that one of them lacks is left out."""
    return {
        metric.key: tuple(one[metric.key] for one in found)
        for metric in metrics
        if all(metric.key in one for one in found)
    }


def check_metrics(comparison: Comparison, keys: set[str], arms: Sequence[ArmResult]) -> None:
    """A metric that no arm has is a slip in the file. Raises UserError."""
    for metric in comparison.metrics:
        if not any(metric.key in arm.values for arm in arms):
            raise UserError(
                f"{comparison.name}: metric {metric.key}: no evaluation has it (there are: {', '.join(sorted(keys))})"
            )


def learning_curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A figure of results.jsonl's validations over samples seen."""
    return tuple(
        (float(row["samples_seen"]), float(row[name]))
        for row in records
        if row["kind"] == "val" and row.get(name) is not None
    )


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Summary]]:
    """Over seeds, where all of them have a value."""
    shared = set.intersection(*({x for x, _ in curve} for curve in curves)) if curves else set()
    tables = [dict(curve) for curve in curves]
    out = []
    for x in sorted(shared):
        found = summary([table[x] for table in tables])
        assert found is not None
        out.append((x, found))
    return out


def as_json(found: Sequence[Found]) -> str:
    return json.dumps([asdict(one) for one in found], indent=1) + "\n"

"""What a comparison found, ready for tables, plots and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.config import Comparison, Metric
from open_clip_ov2.compare.measuring import Cost
from open_clip_ov2.compare.plan import seconds_at
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json

Curve = tuple[tuple[float, float], ...]  # (samples seen, value)


@dataclass(frozen=True)
class VariantResult:
    """One variant. `rates`: images/s by repetition over all its stages; `stage_rates` the medians by stage; `ratios`:
    rates over the reference's, by repetition. `unlike`: flags that differ from the reference's. `over`: the value of
    the flag that metrics are drawn over. `values` and `learning`: by metric, one for each seed."""

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
        """Seconds of one run's training, at the images/s measured."""
        return self.seconds_at(self.samples)

    def seconds_at(self, samples: float) -> float:
        return seconds_at(samples, self.stage_samples, self.stage_rates)

    def shown(self, metric: Metric) -> list[float]:
        """The metric's value for each seed, as it is shown."""
        return [metric.scale * value for value in self.values.get(metric.key, ())]


@dataclass(frozen=True)
class Found:
    """One comparison with all its variants."""

    comparison: Comparison
    variants: tuple[VariantResult, ...]
    machine: str

    @property
    def trained(self) -> tuple[VariantResult, ...]:
        return tuple(variant for variant in self.variants if variant.trained)


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


def best(found: Found) -> dict[str, str]:
    """By metric, the variant that is better than every other one with every seed, if there is one."""
    out = {}
    for metric in found.comparison.metrics:
        values = {one.name: one.values[metric.key] for one in found.variants if metric.key in one.values}
        for name, mine in values.items():
            others = [theirs for other, theirs in values.items() if other != name]
            if others and all(
                metric.sign * a > metric.sign * b for theirs in others for a, b in zip(mine, theirs, strict=True)
            ):
                out[metric.key] = name
    return out


def flatten(value: Any, path: str = "") -> dict[str, float]:
    """Numbers of nested tables by dotted path; a list's items by their index."""
    return dict(_leaves(value, path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, float]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def read_evaluations(paths: Sequence[Path], names: Sequence[str]) -> dict[str, float]:
    """The numbers of several files of `ov2 eval --out`, each under its name if it has one. Raises UserError."""
    out: dict[str, float] = {}
    for path, name in zip(paths, names, strict=True):
        found = flatten(read_json(path, dict, "a result of `ov2 eval` (remove it to evaluate again)"), name)
        twice = next(iter(found.keys() & out.keys()), None)
        if twice:
            raise UserError(f"two [[evaluate]] give {twice}: give one of them a name, which begins its metrics' keys")
        out |= found
    return out


def by_metric(metrics: Sequence[Metric], found: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """The values of each metric over a variant's seeds, without metrics that one of them lacks."""
    keys = [metric.key for metric in metrics]
    return {key: tuple(one[key] for one in found) for key in keys if found and all(key in one for one in found)}


def check_metrics(comparison: Comparison, keys: set[str], variants: Sequence[VariantResult]) -> None:
    """Raises UserError for a metric that no variant has, which is a mistake in the file."""
    for metric in comparison.metrics:
        if not any(metric.key in variant.values for variant in variants):
            known = ", ".join(sorted(keys))
            raise UserError(f"{comparison.name}: metric {metric.key}: no evaluation has it (known: {known})")


def learning_curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """A number of results.jsonl's validations over samples seen."""
    rows = [row for row in records if row["kind"] == "val" and row.get(name) is not None]
    return tuple((float(row["samples_seen"]), float(row[name])) for row in rows)


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Summary]]:
    """Mean curve over seeds, at the points where all of them have a value."""
    tables = [dict(curve) for curve in curves]
    shared = set.intersection(*map(set, tables)) if tables else set()
    means = [(x, summary([table[x] for table in tables])) for x in sorted(shared)]
    return [(x, mean) for x, mean in means if mean is not None]


def as_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    """All results, JSON-ready. Files say `arm` where this package says variant, so that earlier ones stay
    comparable."""
    out = []
    for one in found:
        plain = asdict(one)
        comparison = plain["comparison"] | {"budget": one.comparison.budget}
        comparison["arms"] = comparison.pop("variants")
        for evaluation in comparison["evaluations"]:
            evaluation["arms"] = evaluation.pop("variants")
        out.append({"comparison": comparison, "arms": plain["variants"], "machine": one.machine})
    return out


def write_csv(found: Sequence[Found], writer: Any) -> None:
    """One line for each quantity of each variant, with the value of each seed or repetition."""
    writer.writerow(("comparison", "arm", "model", "quantity", "unit", "mean", "sd", "n", "values"))
    for one in found:
        for variant in one.variants:
            for quantity, unit, values in _quantities(one, variant):
                total = summary(values)
                if total is not None:
                    sd = "" if total.sd is None else f"{total.sd:.6g}"
                    numbers = (f"{total.mean:.6g}", sd, total.n, " ".join(f"{value:.6g}" for value in values))
                    writer.writerow((one.comparison.name, variant.name, variant.model, quantity, unit, *numbers))


def _quantities(found: Found, variant: VariantResult) -> list[tuple[str, str, Sequence[float]]]:
    memory, batch = variant.cost.step_memory_mb, variant.cost.largest_batch
    return [
        ("images per second", "images/s", variant.rates),
        (f"images per second over {found.comparison.reference}", "ratio", variant.ratios),
        ("FLOPs of an image", "FLOP", [variant.flops]),
        ("process memory", "MiB", [variant.memory_mb]),
        ("step memory", "MiB", [] if memory is None else [memory]),
        ("largest batch", "images", [] if batch is None else [batch]),
        ("samples", "samples", [variant.samples] if variant.trained else []),
        ("training", "s", [variant.seconds] if variant.trained else []),
        *((metric.key, metric.unit, variant.shown(metric)) for metric in found.comparison.metrics),
    ]

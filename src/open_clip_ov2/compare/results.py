"""What a comparison found, ready for tables, plots and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.answers import Answer
from open_clip_ov2.compare.config import Comparison, Metric
from open_clip_ov2.compare.measuring import Cost
from open_clip_ov2.compare.plan import Losses
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json

Rows = Sequence[Mapping[str, Any]]  # of a run's results.jsonl
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
        """Seconds of training until so many samples, at the images/s measured for each stage."""
        seconds, left = 0.0, samples
        for count, rate in zip(self.stage_samples, self.stage_rates, strict=True):
            seconds += min(left, count) / rate
            left -= min(left, count)
        return seconds

    def shown(self, metric: Metric) -> list[float]:
        """The metric's value for each seed, as it is shown."""
        return [metric.scale * value for value in self.values.get(metric.key, ())]


def labelled(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


@dataclass(frozen=True)
class Found:
    """`baselines`: numbers of each by dotted path."""

    comparison: Comparison
    variants: tuple[VariantResult, ...]
    machine: str
    answers: tuple[Answer, ...] = ()
    searched: Losses = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[VariantResult, ...]:
        return tuple(variant for variant in self.variants if variant.trained)


@dataclass(frozen=True)
class Summary:
    """Over seeds. `sd` (of a sample, n - 1) is None for one seed."""

    mean: float
    sd: float | None


def summary(values: Sequence[float]) -> Summary:
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


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
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {path: float(value)}
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    out: dict[str, float] = {}
    for key, item in inner:
        out |= flatten(item, f"{path}.{key}" if path else str(key))
    return out


def read_evaluations(files: Mapping[Path, str]) -> dict[str, float]:
    """The numbers of files of `ov2 eval --out`, each under the name given for its file, if any. Raises UserError."""
    out: dict[str, float] = {}
    for file, name in files.items():
        found = flatten(read_json(file, dict, "a result of `ov2 eval` (remove it to evaluate again)"), name)
        for twice in found.keys() & out.keys():
            raise UserError(f"two [[evaluate]] give {twice}: give one of them a name, which begins its metrics' keys")
        out |= found
    return out


def check_metrics(comparison: Comparison, known: set[str], variants: Sequence[VariantResult]) -> None:
    """Raises UserError for a metric that no variant has, which is a mistake in the file."""
    for metric in comparison.metrics:
        if not any(metric.key in variant.values for variant in variants):
            keys = ", ".join(sorted(known))
            raise UserError(f"{comparison.name}: metric {metric.key}: no evaluation has it (known: {keys})")


def learning_curves(metrics: Sequence[Metric], runs: Sequence[Rows]) -> dict[str, tuple[Curve, ...]]:
    """Numbers of validations over samples seen, by metric; `runs`: the rows of each seed's results.jsonl."""

    def curve(rows: Rows, name: str) -> Curve:
        points = ((row["samples_seen"], row.get(name)) for row in rows if row["kind"] == "val")
        return tuple((float(seen), float(value)) for seen, value in points if value is not None)

    return {one.key: tuple(curve(rows, one.learning) for rows in runs) for one in metrics if one.learning}


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Summary]]:
    """Mean curve over seeds, at the points where all of them have a value."""
    tables = [dict(curve) for curve in curves]
    shared = set.intersection(*map(set, tables)) if tables else set()
    return [(x, summary([table[x] for table in tables])) for x in sorted(shared)]


def as_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    """JSON-ready. Files say `arm` where this package says variant, so that earlier ones stay comparable."""
    out = []
    for one in found:
        plain = asdict(one)
        comparison = plain["comparison"] | {"budget": one.comparison.budget}
        for table in (comparison, *comparison["evaluations"]):
            table["arms"] = table.pop("variants")
        answered = [{**asdict(answer), "sentence": answer.sentence} for answer in one.answers]
        more = {"machine": one.machine, "answers": answered, "search": plain["searched"], "baselines": one.baselines}
        out.append({"comparison": comparison, "arms": plain["variants"], **more})
    return out


def as_csv(found: Sequence[Found]) -> str:
    """One line for each quantity of each variant, with the value of each seed or repetition."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("comparison", "arm", "model", "quantity", "unit", "mean", "sd", "n", "values"))
    for one in found:
        for variant in one.variants:
            for quantity, unit, values in _quantities(one, variant):
                if values:
                    total = summary(values)
                    sd = "" if total.sd is None else f"{total.sd:.6g}"
                    numbers = (f"{total.mean:.6g}", sd, len(values), " ".join(f"{value:.6g}" for value in values))
                    writer.writerow((one.comparison.name, variant.name, variant.model, quantity, unit, *numbers))
        for name, known in one.baselines.items():
            for metric in (metric for metric in one.comparison.metrics if metric.key in known):
                value = f"{metric.scale * known[metric.key]:.6g}"
                writer.writerow((one.comparison.name, name, "", metric.key, metric.unit, value, "", 1, value))
    return out.getvalue()


def _quantities(found: Found, variant: VariantResult) -> list[tuple[str, str, Sequence[float]]]:
    memory, batch = variant.cost.step_memory_mb, variant.cost.largest_batch
    return [
        ("images per second", "images/s", variant.rates),
        (f"images per second over {found.comparison.reference}", "ratio", variant.ratios),
        ("FLOPs of an image", "FLOP", [variant.flops]),
        ("step memory", "MiB", [] if memory is None else [memory]),
        ("largest batch", "images", [] if batch is None else [batch]),
        ("samples", "samples", [variant.samples] if variant.trained else []),
        ("training", "s", [variant.seconds] if variant.trained else []),
        *((metric.key, metric.unit, variant.shown(metric)) for metric in found.comparison.metrics),
    ]

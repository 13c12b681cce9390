"""The sentence that a comparison's page begins with: which variant is better, by how much, and whether seeds agree.

A difference is beyond the spread of seeds if the worst seed of the better variant beats the best seed of the other.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import Found


@dataclass(frozen=True)
class Ranking:
    """The best variant by a metric's mean, and the next best. Values are as shown, one for each seed."""

    metric: Metric
    best: str
    values: tuple[float, ...]
    second: str
    second_values: tuple[float, ...]

    @property
    def beyond_seeds(self) -> bool:
        """Whether every seed of the best one beats every seed of the next. One seed cannot tell."""
        sign = self.metric.sign
        mine, theirs = [sign * value for value in self.values], [sign * value for value in self.second_values]
        return len(mine) > 1 and len(theirs) > 1 and min(mine) > max(theirs)


def rankings(found: Found) -> list[Ranking]:
    """Of each metric that at least two trained variants have finite values of, in the file's order."""
    out = []
    for metric in found.comparison.metrics:
        values = {one.name: tuple(one.shown(metric)) for one in found.trained if metric.key in one.values}
        finite = {name: own for name, own in values.items() if all(map(math.isfinite, own))}
        order = sorted(finite, key=lambda name: -metric.sign * statistics.fmean(finite[name]))
        if len(order) > 1:
            best, second = order[:2]
            out.append(Ranking(metric, best, finite[best], second, finite[second]))
    return out


def verdict(found: Found) -> str:
    """One sentence about the first metric, and one or two about all others."""
    ranked = rankings(found)
    if not ranked:
        return "Cannot tell which variant is better: no metric has values of two trained variants."
    sentences = [_sentence(ranked[0], _terms(found))]
    if ranked[1:]:
        clear = [f"{one.best} on {one.metric.label}" for one in ranked[1:] if one.beyond_seeds]
        unclear = [one.metric.label for one in ranked[1:] if not one.beyond_seeds]
        sentences += [f"Best on other metrics, beyond the spread of seeds: {'; '.join(clear)}."] if clear else []
        sentences += [f"Cannot tell which is best on {', '.join(unclear)}."] if unclear else []
    return " ".join(sentences)


def _terms(found: Found) -> str:
    budget, mode = found.comparison.budget, found.comparison.mode
    equal = {"samples": f"{budget:,.0f} samples", "seconds": f"{budget:,.0f} seconds", "flops": "the same FLOPs"}
    return f"after {equal[mode]}{'' if mode == 'flops' else ' each'}"


def _sentence(one: Ranking, terms: str) -> str:
    metric, seeds = one.metric, min(len(one.values), len(one.second_values))
    mean, other = statistics.fmean(one.values), statistics.fmean(one.second_values)
    unit = f" {metric.unit}" if metric.unit and metric.unit != "%" else metric.unit
    numbers = f"{mean:.{metric.digits}f} against {other:.{metric.digits}f}{unit} {terms}"
    if one.beyond_seeds:
        return (
            f"{one.best} is better than {one.second} on {metric.label}: {numbers}{_relative(metric, mean, other)}, "
            f"which is beyond the spread of {seeds} seeds."
        )
    if mean == other:
        reason = "they are equal"
    elif seeds < 2:
        reason = "one seed does not show how much seeds differ"
    else:
        reason = f"the difference is within the spread of {seeds} seeds"
    return f"Cannot tell whether {one.best} or {one.second} is better on {metric.label}: {numbers}, but {reason}."


def _relative(metric: Metric, mean: float, other: float) -> str:
    """Percentage points for percentages, else a percentage of the other's value."""
    change = "higher" if mean > other else "lower"
    if metric.unit == "%":
        return f" ({abs(mean - other):.{metric.digits}f} points {change})"
    return f" ({abs(mean - other) / abs(other):.1%} {change})" if other else ""

"""The sentence that a comparison's page begins with: which variant is better, by how much, and whether seeds agree.

A difference is beyond the spread of seeds if the worst seed of the better variant beats the best seed of the other.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import Found


class Ranking(NamedTuple):
    """The best variant by a metric's mean, and the next best. Values are as shown, one for each seed."""

    metric: Metric
    best: str
    values: list[float]
    second: str
    others: list[float]

    @property
    def beyond_seeds(self) -> bool:
        """Whether every seed of the best one beats every seed of the next. One seed cannot tell."""
        enough = min(len(self.values), len(self.others)) > 1
        return enough and all(self.metric.sign * (a - b) > 0 for a in self.values for b in self.others)


def rankings(found: Found) -> list[Ranking]:
    """Of each metric that at least two trained variants have finite values of, in the file's order."""
    out = []
    for metric in found.comparison.metrics:
        values = {one.name: one.shown(metric) for one in found.trained}
        finite = {name: own for name, own in values.items() if own and all(map(math.isfinite, own))}
        order = sorted(finite, key=lambda name: -metric.sign * statistics.fmean(finite[name]))
        if len(order) > 1:
            out.append(Ranking(metric, order[0], finite[order[0]], order[1], finite[order[1]]))
    return out


def verdict(found: Found) -> str:
    """One sentence about the first metric, and one or two about all others."""
    ranked = rankings(found)
    if not ranked:
        return "Cannot tell which variant is better: no metric has values of two trained variants."
    budget = found.comparison.budget
    terms = {
        "samples": f"after {budget:,.0f} samples each",
        "seconds": f"after {budget:,.0f} seconds each",
        "flops": "after the same FLOPs",
    }
    sentences = [_sentence(ranked[0], terms[found.comparison.mode])]
    clear = [f"{one.best} on {one.metric.label}" for one in ranked[1:] if one.beyond_seeds]
    unclear = [one.metric.label for one in ranked[1:] if not one.beyond_seeds]
    sentences += [f"Best on other metrics, beyond the spread of seeds: {'; '.join(clear)}."] if clear else []
    sentences += [f"Cannot tell which is best on {', '.join(unclear)}."] if unclear else []
    return " ".join(sentences)


def _sentence(one: Ranking, terms: str) -> str:
    metric, seeds = one.metric, min(len(one.values), len(one.others))
    mean, other = statistics.fmean(one.values), statistics.fmean(one.others)
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

"""A comparison's table: one set of cells for Markdown, HTML and the terminal; and CSV with every number."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import ArmResult, Found, summary
from open_clip_ov2.recipe.counts import short_count

NONE = "–"
CSV_HEADER = ("comparison", "arm", "model", "quantity", "unit", "mean", "sd", "n", "values")


def header(found: Found) -> list[str]:
    shown = ["", "images/s", f"× {found.comparison.reference}"]
    shown += [title for title, _ in _costs(found)]
    shown += ["samples", "training, s"]
    return shown + [_titled(metric) for metric in found.comparison.metrics]


def _titled(metric: Metric) -> str:
    arrow = "↑" if metric.better == "higher" else "↓"
    return f"{metric.title}{f', {metric.unit}' if metric.unit else ''} {arrow}"


def _costs(found: Found) -> list[tuple[str, dict[str, float | None]]]:
    """Columns that any arm has something in, by arm."""
    columns: list[tuple[str, dict[str, float | None]]] = [
        ("step memory, MiB", {arm.name: arm.cost.step_memory_mb for arm in found.arms}),
        ("largest batch", {arm.name: arm.cost.largest_batch for arm in found.arms}),
    ]
    return [(title, values) for title, values in columns if any(value is not None for value in values.values())]


def rows(found: Found) -> list[list[str]]:
    return [_row(found, arm) for arm in found.arms]


def _row(found: Found, arm: ArmResult) -> list[str]:
    cells = [arm.name, spread(arm.rates, 0), spread(arm.ratios, 2)]
    costs = [values[arm.name] for _, values in _costs(found)]
    cells += [NONE if value is None else f"{value:,.0f}" for value in costs]
    if not arm.trained:
        return [*cells, NONE, NONE, *(NONE for _ in found.comparison.metrics)]
    cells += [short_count(arm.samples), f"{arm.seconds:,.0f}"]
    return cells + [value(metric, arm) for metric in found.comparison.metrics]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the least and the greatest in brackets."""
    if not values:
        return NONE
    middle, low, high = statistics.median(values), min(values), max(values)
    if len(values) == 1 or f"{low:.{digits}f}" == f"{high:.{digits}f}":
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def value(metric: Metric, arm: ArmResult) -> str:
    """Mean ± standard deviation over seeds."""
    told = summary([metric.scale * one for one in arm.values.get(metric.key, ())])
    if told is None:
        return NONE
    text = f"{told.mean:.{metric.digits}f}"
    return text if told.sd is None else f"{text} ± {told.sd:.{metric.digits}f}"


def best(found: Found) -> dict[str, str]:
    """The arm that is better than each other one that has the metric with every seed, if there is one."""
    out = {}
    for metric in found.comparison.metrics:
        sign = 1 if metric.better == "higher" else -1
        values = {arm.name: arm.values[metric.key] for arm in found.arms if metric.key in arm.values}
        for name, mine in values.items():
            others = [theirs for other, theirs in values.items() if other != name]
            if others and all(
                sign * one > sign * other for theirs in others for one, other in zip(mine, theirs, strict=True)
            ):
                out[metric.key] = name
    return out


def markdown(found: Found) -> str:
    """The table; in bold what is better than all others with every seed."""
    first, winners = header(found), best(found)
    keys = [metric.key for metric in found.comparison.metrics]
    lines = [f"| {' | '.join(first)} |", "|" + "---|" * len(first)]
    for arm, cells in zip(found.arms, rows(found), strict=True):
        fixed = len(cells) - len(keys)
        marked = [
            f"**{cell}**" if winners.get(key) == arm.name else cell
            for key, cell in zip(keys, cells[fixed:], strict=True)
        ]
        lines.append(f"| {' | '.join([*cells[:fixed], *marked])} |")
    return "\n".join(lines) + "\n"


def csv_text(results: Sequence[Found]) -> str:
    """One line for each quantity of each arm, with the value of each seed or repetition."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for found in results:
        for arm in found.arms:
            for quantity, unit, values in _quantities(found, arm):
                told = summary(values)
                if told is not None:
                    sd = "" if told.sd is None else f"{told.sd:.6g}"
                    listed = " ".join(f"{one:.6g}" for one in values)
                    where = (found.comparison.name, arm.name, arm.model, quantity, unit)
                    writer.writerow([*where, f"{told.mean:.6g}", sd, told.n, listed])
    return out.getvalue()


def _quantities(found: Found, arm: ArmResult) -> list[tuple[str, str, Sequence[float]]]:
    memory, batch = arm.cost.step_memory_mb, arm.cost.largest_batch
    fixed: list[tuple[str, str, Sequence[float]]] = [
        ("images per second", "images/s", arm.rates),
        (f"images per second over {found.comparison.reference}", "ratio", arm.ratios),
        ("FLOPs of an image", "FLOP", [arm.flops]),
        ("process memory", "MiB", [arm.memory_mb]),
        ("step memory", "MiB", [] if memory is None else [memory]),
        ("largest batch", "images", [] if batch is None else [batch]),
    ]
    if arm.trained:
        fixed += [("samples", "samples", [arm.samples]), ("training", "s", [arm.seconds])]
    measured = [
        (metric.key, metric.unit, [metric.scale * v for v in arm.values.get(metric.key, ())])
        for metric in found.comparison.metrics
    ]
    return fixed + measured

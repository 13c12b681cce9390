"""Plots as SVG for a page: text in the page's own color and font, nothing fetched, ids that do not clash."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from open_clip_ov2.compare.answers import Answer
from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import Found, VariantResult, labelled, mean_curve, summary
from open_clip_ov2.tracking.figures import COLORS, MARKERS, figure

INK = "#010203"  # stands for the page's text color until the SVG is written
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "axes.titlecolor": INK, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "svg.hashsalt": "ov2", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.15, "axes.titlesize": 10, "legend.frameon": False,
}  # fmt: skip


class Plot(NamedTuple):
    """`name` is its id on the page; `caption` says what it shows."""

    name: str
    caption: str
    svg: str


def plots(found: Found) -> list[Plot]:
    """All that a comparison has numbers for."""
    over, trained, out = found.comparison.curve_over, found.trained, []
    for metric in found.comparison.metrics:
        name, label = f"{found.comparison.name}-{metric.key}", metric.label
        if metric.learning and any(any(one.learning.get(metric.key, ())) for one in trained):
            for axis, where in (("samples", ""), ("seconds", ", at the images/s measured beforehand")):
                caption = f"Held-out {label} over {axis}{where}; mean and standard deviation of seeds."
                draw = partial(learning, found=found, metric=metric, over=axis)
                out.append(_plot(f"{name}-over-{axis}", caption, draw))
        caption = f"{label} at the end of training: each seed, mean and standard deviation; the arrow points to better."
        draw, size = partial(final, found=found, metric=metric), (6.4, 1.2 + 0.4 * len(trained))
        out.append(_plot(f"{name}-at-the-end", caption, draw, size))
        if over:
            caption = f"{label} at the end of training, over {over}: mean and standard deviation of seeds."
            out.append(_plot(f"{name}-over-{over}", caption, partial(over_flag, found=found, metric=metric)))
    return out


def answer_plots(results: Sequence[Found]) -> list[Plot]:
    """The differences of all answers with their intervals, in one figure for each unit, most answers first."""
    by_unit: dict[str, list[Answer]] = {}
    for answer in (answer for found in results for answer in found.answers):
        by_unit.setdefault(answer.metric.unit, []).append(answer)
    out = []
    for number, (unit, found) in enumerate(sorted(by_unit.items(), key=lambda item: -len(item[1]))):
        what = "points" if unit == "%" else unit or "the metric's own unit"
        caption = f"Differences in {what} between two variants, with 95% intervals; gray where 0 lies inside."
        size = (9.6, 0.9 + 0.34 * len(found))
        out.append(_plot(f"answers-{number}", caption, partial(intervals, found=found, what=what), size))
    return out


def intervals(axes: Any, found: Sequence[Answer], what: str) -> None:
    """Each difference with its interval; in gray where it cannot tell."""
    for place, answer in enumerate(reversed(found)):
        reach = [[answer.difference - answer.low], [answer.high - answer.difference]]
        color = COLORS[0] if answer.better else COLORS[5]
        axes.errorbar(answer.difference, place, xerr=reach, fmt="o", color=color, capsize=3, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    names = [f"{one.question.a} − {one.question.b}: {one.metric.label}" for one in reversed(found)]
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set(xlabel=f"difference, {what}")


def _plot(name: str, caption: str, draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 3.8)) -> Plot:
    """`size` in inches."""
    name = re.sub(r"[^a-zA-Z0-9]+", "-", name).lower()
    out, about = io.StringIO(), {"Date": None, "Creator": None}
    with figure(out, size=size, style=STYLE, format="svg", transparent=True, metadata=about) as (axes,):
        draw(axes)
    return Plot(name, caption, _for_page(out.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """matplotlib's SVG with the page's color and font, as wide as its place, and ids that begin with `name`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    svg = re.sub(r"font: (?:[\w.]+ )?([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", svg)
    svg = re.sub(r'id="|xlink:href="#|url\(#', lambda match: f"{match.group(0)}{name}-", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)


def _look(found: Found, variant: VariantResult) -> tuple[str, str]:
    """Color and marker of a variant, the same in all plots of a comparison."""
    index = [one.name for one in found.variants].index(variant.name)
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def learning(axes: Any, found: Found, metric: Metric, over: str) -> None:
    """Mean over seeds with a band of one standard deviation."""
    from matplotlib.ticker import EngFormatter

    for variant in found.trained:
        points = mean_curve(variant.learning.get(metric.key, ()))
        if not points:
            continue
        x = [seen if over == "samples" else variant.seconds_at(seen) for seen, _ in points]
        means = metric.scale * np.array([mean.mean for _, mean in points])
        sds = metric.scale * np.array([mean.sd or 0.0 for _, mean in points])
        color, marker = _look(found, variant)
        axes.plot(x, means, marker=marker, color=color, markersize=4, label=variant.name)
        axes.fill_between(x, means - sds, means + sds, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="samples seen" if over == "samples" else "seconds of training", ylabel=labelled(metric))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()


def final(axes: Any, found: Found, metric: Metric) -> None:
    """Every seed's value, with mean and standard deviation."""
    names = [one.name for one in reversed(found.trained)]
    for place, variant in enumerate(reversed(found.trained)):
        if values := variant.shown(metric):
            total, (color, marker) = summary(values), _look(found, variant)
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
            axes.errorbar(total.mean, place, xerr=total.sd or 0, fmt=marker, color=color, capsize=3, markersize=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title(f"{labelled(metric)} {'→' if metric.better == 'higher' else '←'}")


def over_flag(axes: Any, found: Found, metric: Metric) -> None:
    """The metric over the value of a flag."""
    shown = [(one.over, one.shown(metric)) for one in found.trained if one.over is not None]
    totals = [(x, summary(values)) for x, values in shown if values]
    if totals:
        x, means, sds = zip(*sorted((x, total.mean, total.sd or 0.0) for x, total in totals), strict=True)
        axes.errorbar(x, means, yerr=sds, fmt="o-", color=COLORS[0], capsize=3, markersize=5)
    arrow = "↑" if metric.better == "higher" else "↓"
    axes.set(title=f"{labelled(metric)} {arrow}", xlabel=found.comparison.curve_over or "")

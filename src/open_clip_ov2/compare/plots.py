"""Plots as SVG for a page: text in the page's own color and font, nothing fetched, ids that do not clash."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from open_clip_ov2.compare.answers import Answer
from open_clip_ov2.compare.parts import Metric
from open_clip_ov2.compare.results import Found, VariantResult, mean_curve, summary
from open_clip_ov2.tracking.figures import COLORS, MARKERS, figure

COLUMNS = 3  # panels side by side
INK = "#010203"  # stands for the page's text color until the SVG is written
STYLE = {
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "axes.titlecolor": INK, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "svg.hashsalt": "ov2", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": INK, "grid.alpha": 0.15, "axes.titlesize": 10, "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """`name` is its id on the page; `caption` says what it shows."""

    name: str
    caption: str
    svg: str
    wide: bool = False  # of several panels


def plots(found: Found) -> list[Plot]:
    """All that a comparison has numbers for."""
    metrics, over, trained = found.comparison.metrics, found.comparison.curve_over, found.trained
    size = (6.4, 0.7 + 0.42 * len(found.variants))
    caption = "Images/s: median and range of repetitions in turns."
    out = [_plot(found, "speed", caption, [partial(speeds, found=found)], size)]
    for metric in metrics:
        if metric.learning and any(any(one.learning.get(metric.key, ())) for one in trained):
            for axis, where in (("samples", ""), ("seconds", ", at the images/s measured beforehand")):
                caption = f"Held-out {metric.label} over {axis}{where}; mean and standard deviation of seeds."
                draw = partial(learning, found=found, metric=metric, over=axis)
                out.append(_plot(found, f"{metric.key}-over-{axis}", caption, [draw]))
    if metrics:
        caption = "At the end of training: each seed, mean and standard deviation; the arrow points to better."
        each = [
            partial(final, found=found, metric=metric, named=index % COLUMNS == 0)
            for index, metric in enumerate(metrics)
        ]
        out.append(_plot(found, "finals", caption, each, (3.2, 1.0 + 0.3 * len(trained))))
    if over:
        flags = [partial(over_flag, found=found, metric=metric) for metric in metrics]
        out.append(
            _plot(found, f"over-{over}", f"Over {over}: mean and standard deviation of seeds.", flags, (3.2, 2.6))
        )
    return out


def answer_plots(results: Sequence[Found]) -> list[Plot]:
    """The differences of all answers with their intervals, in one figure for each unit, most answers first."""
    by_unit: dict[str, list[Answer]] = {}
    for answer in (answer for found in results for answer in found.answers):
        by_unit.setdefault(answer.unit, []).append(answer)
    out = []
    for number, (unit, found) in enumerate(sorted(by_unit.items(), key=lambda item: -len(item[1]))):
        what = "points" if unit == "%" else unit or "the metric's own unit"
        caption = f"Differences in {what} between two variants, with 95% intervals; gray where 0 lies inside."
        size = (9.6, 0.9 + 0.34 * len(found))
        out.append(_drawn(f"answers-{number}", caption, [partial(intervals, found=found, what=what)], size))
    return out


def intervals(axes: Any, found: Sequence[Answer], what: str) -> None:
    """Each difference with its interval; in gray where it cannot tell."""
    for place, answer in enumerate(reversed(found)):
        reach = [[answer.difference - answer.low], [answer.high - answer.difference]]
        color = COLORS[0] if answer.better else COLORS[5]
        axes.errorbar(answer.difference, place, xerr=reach, fmt="o", color=color, capsize=3, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{one.a} − {one.b}: {one.metric}" for one in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set(xlabel=f"difference, {what}")


def _plot(
    found: Found, name: str, caption: str, draw: Sequence[Callable[[Any], None]], size: tuple[float, float] = (6.4, 3.8)
) -> Plot:
    """A panel for each of `draw`, three in a row. `size` is that of one panel, in inches."""
    name = f"{found.comparison.name}-{re.sub(r'[^a-zA-Z0-9]+', '-', name).strip('-').lower()}"
    return _drawn(name, caption, draw, size)


def _drawn(name: str, caption: str, draw: Sequence[Callable[[Any], None]], size: tuple[float, float]) -> Plot:
    columns, rows = min(COLUMNS, len(draw)), -(-len(draw) // COLUMNS)
    out, saving = io.StringIO(), {"format": "svg", "transparent": True, "metadata": {"Date": None, "Creator": None}}
    with figure(out, columns, rows, size=(size[0] * columns, size[1] * rows), style=STYLE, **saving) as panels:
        for axes, one in zip_longest(panels, draw):
            axes.set_visible(one is not None)
            if one is not None:
                one(axes)
    return Plot(name, caption, _for_page(out.getvalue(), name), wide=len(draw) > 1)


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


def _labelled(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def learning(axes: Any, found: Found, metric: Metric, over: str) -> None:
    """Mean over seeds with a band of one standard deviation."""
    from matplotlib.ticker import EngFormatter

    for variant in found.trained:
        points = mean_curve(variant.learning.get(metric.key, ()))
        if not points:
            continue
        x = [seen if over == "samples" else variant.seconds_at(seen) for seen, _ in points]
        means = [metric.scale * mean.mean for _, mean in points]
        sds = [abs(metric.scale) * (mean.sd or 0.0) for _, mean in points]
        color, marker = _look(found, variant)
        axes.plot(x, means, marker=marker, color=color, markersize=4, label=variant.name)
        low, high = zip(*((m - s, m + s) for m, s in zip(means, sds, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="samples seen" if over == "samples" else "seconds of training", ylabel=_labelled(metric))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()


def speeds(axes: Any, found: Found) -> None:
    """Images/s: the median, and the least and the greatest of the repetitions."""
    names = [one.name for one in reversed(found.variants)]
    for place, variant in enumerate(reversed(found.variants)):
        middle = statistics.median(variant.rates)
        reach = [[middle - min(variant.rates)], [max(variant.rates) - middle]]
        color, _ = _look(found, variant)
        axes.barh(place, middle, color=color, height=0.6, xerr=reach, ecolor=INK, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="images/s in training")
    axes.grid(visible=False, axis="y")


def final(axes: Any, found: Found, metric: Metric, named: bool) -> None:
    """Every seed's value, with mean and standard deviation; `named`: with the variants' names."""
    names = [one.name for one in reversed(found.trained)]
    for place, variant in enumerate(reversed(found.trained)):
        values = variant.shown(metric)
        if total := summary(values):
            color, marker = _look(found, variant)
            axes.plot(values, [place] * len(values), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
            axes.errorbar(total.mean, place, xerr=total.sd or 0, fmt=marker, color=color, capsize=3, markersize=6)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title(f"{_labelled(metric)} {'→' if metric.better == 'higher' else '←'}")


def over_flag(axes: Any, found: Found, metric: Metric) -> None:
    """The metric over the value of a flag."""
    points = [(one.over, summary(one.shown(metric))) for one in found.trained if one.over is not None]
    known = sorted((x, total.mean, total.sd or 0.0) for x, total in points if total is not None)
    if known:
        x, means, sds = zip(*known, strict=True)
        axes.errorbar(x, means, yerr=sds, fmt="o-", color=COLORS[0], capsize=3, markersize=5)
    arrow = "↑" if metric.better == "higher" else "↓"
    axes.set(title=f"{_labelled(metric)} {arrow}", xlabel=found.comparison.curve_over or "")

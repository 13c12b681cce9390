"""Plots as SVG, to stand in a page: text in the page's own colour and font, nothing fetched, ids that do not clash."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.results import ArmResult, Found, mean_curve, summary

INK = "#010203"  # stands for the page's text colour until the SVG is written
# Told apart by people with the usual colour blindnesses, and on white as on black (Okabe and Ito's set, made lighter).
COLOURS = ("#2f7fc1", "#e0803a", "#2a9d74", "#b45f9c", "#b59a1d", "#7f7f7f", "#cf4f4f", "#49a8b8")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Plot:
    """`name` is its id on the page and the stem of a file; `caption` says what it shows."""

    name: str
    caption: str
    svg: str
    wide: bool = False  # of several panels


def plots(found: Found) -> list[Plot]:
    """All that a comparison has figures for."""
    out = [_speeds(found)]
    for metric in found.comparison.metrics:
        if metric.learning and any(any(arm.learning.get(metric.key, ())) for arm in found.trained):
            out += [_learning(found, metric, over) for over in ("samples", "seconds")]
    if found.comparison.metrics:
        out.append(_finals(found))
    if found.comparison.curve_over:
        out.append(_over_flag(found))
    return out


def _figure(columns: int, rows: int, width: float, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
        "axes.titlecolor": INK, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
        "svg.hashsalt": "ov2", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": INK, "grid.alpha": 0.15, "axes.titlesize": 10, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def _svg(figure: Any, name: str) -> str:
    import matplotlib
    from matplotlib import pyplot as plt

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ov2"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(INK, "currentColor")
    text = re.sub(r"font: (?:[\w.]+ )?([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", text)
    for pattern in (r'id="', r'xlink:href="#', r"url\(#"):
        text = re.sub(pattern, lambda match: match.group(0) + name + "-", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)


def _colour(found: Found, arm: ArmResult) -> tuple[str, str]:
    index = [one.name for one in found.arms].index(arm.name)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _axis(metric: Metric) -> str:
    return f"{metric.title}{f' ({metric.unit})' if metric.unit else ''}"


def _learning(found: Found, metric: Metric, over: str) -> Plot:
    """Mean over seeds with a band of one standard deviation."""
    figure, (axes,) = _figure(1, 1, 6.4, 3.8)
    for arm in found.trained:
        points = mean_curve(arm.learning.get(metric.key, ()))
        if not points:
            continue
        place: Callable[[float], float] = (lambda x: x) if over == "samples" else arm.seconds_at
        x = [place(seen) for seen, _ in points]
        means = [metric.scale * told.mean for _, told in points]
        sds = [metric.scale * (told.sd or 0.0) for _, told in points]
        colour, marker = _colour(found, arm)
        axes.plot(x, means, marker=marker, color=colour, markersize=4, label=arm.name)
        low, high = zip(*((m - s, m + s) for m, s in zip(means, sds, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="samples seen" if over == "samples" else "seconds of training", ylabel=_axis(metric))
    _engineer(axes)
    _legend(axes)
    name = f"{found.comparison.name}-{_plain(metric.key)}-over-{over}"
    where = ", at the images/s measured beforehand" if over == "seconds" else ""
    return Plot(
        name, f"Held-out {metric.title} over {over}{where}; mean and standard deviation of seeds.", _svg(figure, name)
    )


def _engineer(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend(axes: Any) -> None:
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)


def _speeds(found: Found) -> Plot:
    """Images/s: the median, and the least and the greatest of the repetitions."""
    arms = found.arms
    figure, (axes,) = _figure(1, 1, 6.4, 0.7 + 0.42 * len(arms))
    for place, arm in enumerate(reversed(arms)):
        middle = statistics.median(arm.rates)
        reach = [[middle - min(arm.rates)], [max(arm.rates) - middle]]
        axes.barh(place, middle, color=_colour(found, arm)[0], height=0.6, xerr=reach, ecolor=INK, capsize=3)
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)])
    axes.set(xlabel="images/s in training")
    axes.grid(visible=False, axis="y")
    name = f"{found.comparison.name}-speed"
    return Plot(name, "Images/s: median and range of interleaved repetitions.", _svg(figure, name))


def _finals(found: Found) -> Plot:
    """Every seed's value, with mean and standard deviation, one panel a metric."""
    metrics, arms = found.comparison.metrics, found.trained
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, panels = _figure(columns, lines, 3.0 * columns + 0.4, (1.0 + 0.3 * len(arms)) * lines)
    for index, (axes, metric) in enumerate(zip(panels, metrics, strict=False)):
        for place, arm in enumerate(reversed(arms)):
            values = [metric.scale * one for one in arm.values.get(metric.key, ())]
            told = summary(values)
            if told is None:
                continue
            colour, marker = _colour(found, arm)
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
            axes.errorbar(told.mean, place, xerr=told.sd or 0, fmt=marker, color=colour, capsize=3, markersize=6)
        shown = [arm.name for arm in reversed(arms)] if index % columns == 0 else [""] * len(arms)
        axes.set_yticks(range(len(arms)), shown)
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.set_title(f"{_axis(metric)} {'→' if metric.better == 'higher' else '←'}")
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    name = f"{found.comparison.name}-finals"
    caption = "At the end of training: each seed, mean and standard deviation; the arrow points to better."
    return Plot(name, caption, _svg(figure, name), wide=True)


def _over_flag(found: Found) -> Plot:
    """Metrics over the value of a flag, one panel each."""
    over = found.comparison.curve_over or ""
    arms: Sequence[ArmResult] = sorted(
        (arm for arm in found.trained if arm.over is not None), key=lambda arm: arm.over or 0.0
    )
    metrics = found.comparison.metrics
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, panels = _figure(columns, lines, 3.0 * columns + 0.4, 2.6 * lines)
    for axes, metric in zip(panels, metrics, strict=False):
        points = [(arm.over, summary(arm.values.get(metric.key, ()))) for arm in arms]
        told = [(x, one) for x, one in points if one is not None]
        means, sds = [metric.scale * one.mean for _, one in told], [metric.scale * (one.sd or 0) for _, one in told]
        axes.errorbar([x for x, _ in told], means, yerr=sds, fmt="o-", color=COLOURS[0], capsize=3, markersize=5)
        axes.set(title=f"{_axis(metric)} {'↑' if metric.better == 'higher' else '↓'}", xlabel=over)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    name = f"{found.comparison.name}-over-{_plain(over)}"
    return Plot(name, f"Over {over}: mean and standard deviation of seeds.", _svg(figure, name), wide=True)


def _plain(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", text).strip("-").lower()

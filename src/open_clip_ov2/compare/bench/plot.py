"""Results as a picture: images per second and step memory, a group of bars for each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.bench.bench_results import Measured, Results
from open_clip_ov2.compare.bench.cases import Case

MB = 1e6


def plot_results(results: Results, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases, arms = results.cases, list(dict.fromkeys(one.arm for one in results.measured))
    figure, axes = plt.subplots(1, 2, figsize=(5.0 + 2.5 * len(cases), 4.2), layout="constrained")
    _bars(axes[0], results, cases, arms, _speed, "images/s (median, least to greatest)")
    _bars(axes[1], results, cases, arms, _memory, "step memory, MB")
    axes[0].legend(frameon=False)
    figure.suptitle(results.machine.get("device", ""), fontsize="medium")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _speed(one: Measured) -> tuple[float, float, float]:
    speed = one.images_per_second
    return speed.median, speed.median - speed.low, speed.high - speed.median


def _memory(one: Measured) -> tuple[float, float, float]:
    return one.step_bytes / MB, 0.0, 0.0


def _bars(
    axes: Any,
    results: Results,
    cases: Sequence[Case],
    arms: Sequence[str],
    value: Callable[[Measured], tuple[float, float, float]],
    title: str,
) -> None:
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        found = {one.case: value(one) for one in results.measured if one.arm == arm and one.step_s}
        places = [place + index * width for place, case in enumerate(cases) if case in found]
        heights, below, above = (
            zip(*(found[case] for case in cases if case in found), strict=True) if found else ((),) * 3
        )
        axes.bar(places, heights, width, yerr=[below, above] if found else None, capsize=2, label=arm)
    names = [f"{case.resolution} px\n{case.precision}\nbatch {case.batch_size}" for case in cases]
    axes.set_xticks([place + width * (len(arms) - 1) / 2 for place in range(len(cases))], names)
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)

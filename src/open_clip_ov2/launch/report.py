"""A sweep's runs side by side: table (CSV, Markdown) and a plot of one metric over what was swept."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.state import DIED, FAILED, RunState
from open_clip_ov2.launch.sweep import short
from open_clip_ov2.tracking.figures import read_results
from open_clip_ov2.tracking.hparams import read_hparams


@dataclass(frozen=True)
class Row:
    """One run. `last` and `best` of the metric; None where it has none."""

    name: str
    varied: Mapping[str, Any]
    state: str
    reason: str
    samples_seen: int
    last: float | None
    best: float | None
    images_per_second: float | None
    restarts: int
    hparams: Mapping[str, Any]


def rows(found: Sequence[RunState], metric: str) -> list[Row]:
    return [_row(run, metric) for run in found]


def _row(run: RunState, metric: str) -> Row:
    try:
        records = read_results(run.run_dir)
    except UserError:  # has not begun
        records = []
    # Held-out figures if there are any.
    values = _values(records, "val", metric) or _values(records, "train", metric)
    if run.state in (FAILED, DIED):  # where it broke off is no result
        values = []
    speeds = _values(records, "train", "images_per_second")
    smaller_is_better = "loss" in metric or metric == "perplexity"
    return Row(
        name=run.member.name,
        varied=run.member.varied,
        state=run.state,
        reason=run.reason,
        samples_seen=run.status.samples_seen if run.status else 0,
        last=values[-1] if values else None,
        best=(min if smaller_is_better else max)(values) if values else None,
        images_per_second=sum(speeds) / len(speeds) if speeds else None,
        restarts=run.status.restarts if run.status else 0,
        hparams=read_hparams(run.run_dir / "tensorboard"),
    )


def _values(records: Sequence[Mapping[str, Any]], kind: str, metric: str) -> list[float]:
    return [row[metric] for row in records if row["kind"] == kind and row.get(metric) is not None]


def table(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """(header, lines). What was swept, then flags that TensorBoard's hparams show to differ, then how it went."""
    swept = list(dict.fromkeys(key for row in rows for key in row.varied))
    told = [
        key for key in dict.fromkeys(key for row in rows for key in row.hparams) if key.replace("_", "-") not in swept
    ]
    differ = [key for key in told if len({str(row.hparams[key]) for row in rows if key in row.hparams}) > 1]
    header = ["run", *swept, *differ, "state", "samples", metric, f"best {metric}", "images/s", "restarts", "reason"]
    lines = [
        [
            row.name,
            *(_text(row.varied.get(key)) for key in swept),
            *(_text(row.hparams.get(key)) for key in differ),
            row.state,
            str(row.samples_seen),
            _text(row.last),
            _text(row.best),
            _text(row.images_per_second),
            str(row.restarts),
            row.reason,
        ]
        for row in rows
    ]
    return header, lines


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_report(rows_: Sequence[Row], metric: str, folder: Path) -> list[Path]:
    """report.csv, report.md, and report.png if any run has the metric."""
    header, lines = table(rows_, metric)
    files = [folder / "report.csv", folder / "report.md"]
    with open(files[0], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    cells = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
    files[1].write_text(text + "\n", encoding="utf-8")
    if any(row.last is not None for row in rows_):
        files.append(folder / "report.png")
        plot(rows_, metric, files[2])
    return files


def plot(rows_: Sequence[Row], metric: str, out: Path) -> None:
    """The metric over the swept number with most values, a line for each setting of the rest; or a bar for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows_ if row.last is not None]
    axis = _axis(shown)
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    if axis is None:
        axes.barh([row.name for row in shown], [row.last or 0.0 for row in shown])
        axes.set(xlabel=metric.replace("_", " "))
    else:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in shown:
            rest = ", ".join(f"{key} {short(value)}" for key, value in row.varied.items() if key != axis)
            if axis in row.varied and row.last is not None:
                lines.setdefault(rest or metric, []).append((float(row.varied[axis]), row.last))
            elif row.last is not None:  # a baseline, which has no such flag
                axes.axhline(row.last, linestyle="--", linewidth=1, color=f"C{len(axes.lines)}", label=rest)
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
        axes.set(xlabel=axis.replace("-", " "), ylabel=metric.replace("_", " "))
        axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _axis(shown: Sequence[Row]) -> str | None:
    """The swept flag with the most different numbers; none if there is no flag with two."""
    numbers: dict[str, set[float]] = {}
    for row in shown:
        for key, value in row.varied.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(key, set()).add(float(value))
    best = max(numbers, key=lambda key: len(numbers[key]), default=None)
    return best if best is not None and len(numbers[best]) > 1 else None

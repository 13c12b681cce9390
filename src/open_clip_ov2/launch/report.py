"""The runs of a sweep side by side: a table (CSV, Markdown), and a plot of a metric over what was varied."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.state import DIED, FAILED, RunState
from open_clip_ov2.launch.sweep import short
from open_clip_ov2.tracking.figures import figure, read_results, series
from open_clip_ov2.tracking.text_table import markdown

if TYPE_CHECKING:
    from open_clip_ov2.tracking.figures import Axes


@dataclass(frozen=True)
class Row:
    """One run: what was varied, and the cells that are shown of it: the metric (None if it has none) and more."""

    name: str
    varied: Mapping[str, Any]
    cells: Mapping[str, Any]


def row_of(run: RunState, metric: str) -> Row:
    try:
        records = read_results(run.run_dir)
    except UserError:  # it has not begun
        records = []
    # Of the validation data if it was validated. The value at which a run broke off does not count.
    found = series(records, "val", metric)[1] or series(records, "train", metric)[1]
    values = [] if run.state in (FAILED, DIED) else found
    speeds = series(records, "train", "images_per_second")[1]
    better = min if "loss" in metric or metric == "perplexity" else max
    cells = {
        "state": run.state,
        "samples": run.status.samples_seen if run.status else 0,
        metric: values[-1] if values else None,
        f"best {metric}": better(values, default=None),
        "images/s": sum(speeds) / len(speeds) if speeds else None,
        "restarts": run.status.restarts if run.status else 0,
        "reason": run.reason,
    }
    return Row(run.spec.name, run.spec.varied, cells)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The header, and a line for each run: the varied flags, then the results."""
    swept = dict.fromkeys(key for row in rows for key in row.varied)
    header = ["run", *swept, *(rows[0].cells if rows else ())]
    cells = ({**dict.fromkeys(swept), "run": row.name, **row.varied, **row.cells} for row in rows)
    return [header, *([_text(row[name]) for name in header] for row in cells)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_report(rows: Sequence[Row], metric: str, folder: Path) -> list[Path]:
    """report.csv, report.md, and report.png if any run has the metric."""
    lines = table(rows)
    files = [folder / "report.csv", folder / "report.md"]
    with open(files[0], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    files[1].write_text(markdown(lines) + "\n", encoding="utf-8")
    if any(row.cells[metric] is not None for row in rows):
        files.append(folder / "report.png")
        with figure(files[2]) as (axes,):
            draw(axes, rows, metric)
    return files


def draw(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    """The metric over the swept flag with the most different numbers, with a line for each setting of the other flags.

    A run without that flag is a horizontal line; if no flag has two numbers, each run is a bar.
    """
    shown = [(row, row.cells[metric]) for row in rows if row.cells[metric] is not None]
    swept = _swept_number([row for row, _ in shown])
    if swept is None:
        axes.barh([row.name for row, _ in shown], [value for _, value in shown])
        axes.set(xlabel=metric.replace("_", " "))
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, value in shown:
        others = ", ".join(f"{key} {short(value)}" for key, value in row.varied.items() if key != swept)
        number = row.varied.get(swept)
        if _is_number(number):
            lines.setdefault(others or metric, []).append((float(number), value))
        else:  # a baseline, which has no such flag, or a range of keep ratios
            others = f"{swept} {number}, {others}".removesuffix(", ") if number is not None else others
            axes.axhline(value, linestyle="--", linewidth=1, color=f"C{len(axes.lines)}", label=others)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes.set(xlabel=swept.replace("-", " "), ylabel=metric.replace("_", " "))
    axes.legend(fontsize="small")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _swept_number(rows: Sequence[Row]) -> str | None:
    """The swept flag with the most different numbers; None if no flag has two."""
    numbers: dict[str, set[float]] = {}
    for row in rows:
        for key, value in row.varied.items():
            if _is_number(value):
                numbers.setdefault(key, set()).add(float(value))
    best = max(numbers, key=lambda key: len(numbers[key]), default="")
    return best if len(numbers.get(best, ())) > 1 else None

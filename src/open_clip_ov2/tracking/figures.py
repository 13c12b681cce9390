"""The one matplotlib set-up, and the figures of runs: curves from results.jsonl, robustness curves from evaluations."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes  # for modules that draw: no other package imports matplotlib

EVAL_FILE = "eval.json"
SIZE = (7.5, 4.5)  # inches, of one panel
DPI = 150
# Distinguishable with the usual color blindnesses, on white and on black (Okabe and Ito's set, made lighter).
COLORS = ("#2f7fc1", "#e0803a", "#2a9d74", "#b45f9c", "#b59a1d", "#7f7f7f", "#cf4f4f", "#49a8b8")
MARKERS = "osD^vPX*"
_STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
_UNITS = {"caption_loss": "nats per token", "images_per_second": "images/s"}
_FORMER_NAMES = {"utilisation": "mfu"}  # metrics of results.jsonl files that an earlier version wrote
REACH = 5  # values on each side in the window that smooths a training curve


@contextlib.contextmanager
def figure(
    out: Path | IO[Any],
    columns: int = 1,
    *,
    size: tuple[float, float] = SIZE,
    style: Mapping[str, Any] | None = None,
    **saving: Any,
) -> Iterator[list[Axes]]:
    """Panels to draw on, side by side; saved as `out` when the block ends without an error. `size` in inches; `style`
    adds to matplotlib's rc parameters; `saving` goes to `savefig`. No display is needed, and nothing of matplotlib's
    global state stays changed."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    parameters: Any = {**_STYLE, "axes.prop_cycle": cycler(color=COLORS), **(style or {})}
    with matplotlib.rc_context(parameters):
        drawn = Figure(figsize=size, layout="constrained")
        yield list(drawn.subplots(1, columns, squeeze=False).flat)
        drawn.savefig(out, **{"dpi": DPI, **saving})


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """Records of RUN/results.jsonl, without a torn last line (the run was killed while it wrote). Raises UserError."""
    path = run_dir / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir}: not the folder of a run (it has no results.jsonl)")
    records = read_json_lines(path)
    if not records:
        raise UserError(f"{path}: no record in it")
    return [{_FORMER_NAMES.get(name, name): value for name, value in record.items()} for record in records]


def plot_curves(run_dirs: Sequence[Path], out: Path, metric: str = "caption_loss") -> None:
    """Image file: training (light, smoothed) and validation (dots) of each run over samples seen. Raises UserError."""
    names = _told_apart(run_dirs, [run_dir.resolve().name for run_dir in run_dirs])
    records = {name: read_results(run_dir) for name, run_dir in zip(names, run_dirs, strict=True)}
    metric = _FORMER_NAMES.get(metric, metric)
    if not any(series(rows, kind, metric)[0] for rows in records.values() for kind in ("train", "val")):
        raise UserError(f"--metric {metric}: no run has it in its results.jsonl")
    with figure(out) as (axes,):
        draw_curves(axes, records, metric)


def draw_curves(axes: Axes, records: Mapping[str, list[dict[str, Any]]], metric: str) -> None:
    """Curves of each run, from its records by its name; a dashed line where a stage begins."""
    from matplotlib.ticker import EngFormatter

    for index, (name, rows) in enumerate(records.items()):
        seen, values = series(rows, "train", metric)
        if seen:
            axes.plot(seen, smoothed(values), color=f"C{index}", alpha=0.4, label=f"{name}, training (smoothed)")
        seen, values = series(rows, "val", metric)
        if seen:
            axes.plot(seen, values, "o-", color=f"C{index}", markersize=4, label=f"{name}, validation")
        for before, after in pairwise(rows):
            if before.get("stage") != after.get("stage"):
                axes.axvline(after["samples_seen"], color="gray", linestyle="--", linewidth=1)
    unit = f" ({_UNITS[metric]})" if metric in _UNITS else ""
    axes.set(xlabel="samples seen", ylabel=f"{metric.replace('_', ' ')}{unit}")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend()


def _told_apart(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The names; in place of a name that several have, the paths as they were given."""
    return [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def series(records: Sequence[Mapping[str, Any]], kind: str, metric: str) -> tuple[list[float], list[float]]:
    """Samples seen and values, of the records that have the metric."""
    rows = [row for row in records if row["kind"] == kind and row.get(metric) is not None]
    return [row["samples_seen"] for row in rows], [row[metric] for row in rows]


def smoothed(values: Sequence[float]) -> list[float]:
    """The median of a window around each value, which shrinks towards both ends: a curve that only falls stays as it
    is, where a mean of past values would show the first, high losses for long."""
    reaches = [min(REACH, index, len(values) - 1 - index) for index in range(len(values))]
    return [statistics.median(values[i - reach : i + reach + 1]) for i, reach in enumerate(reaches)]


@dataclass(frozen=True)
class Panel:
    """A metric of `ov2 eval` over a setting: the rows by setting are `result[task][table]`, `path` leads from a row to
    its number, which is drawn times `scale`."""

    task: str
    table: str
    path: tuple[str, ...]
    x_label: str
    y_label: str
    scale: float = 1.0

    def points(self, result: Mapping[str, Any]) -> list[tuple[float, float]]:
        rows = result.get(self.task, {}).get(self.table, {})
        numbers = {x: functools.reduce(_at, self.path, row) for x, row in rows.items()}
        return [(float(x), self.scale * y) for x, y in numbers.items() if isinstance(y, (int, float))]


def _at(row: Any, key: str) -> Any:
    return row.get(key) if isinstance(row, Mapping) else None


_LOSS, _PIXELS = "caption loss (nats per token)", "resolution (px)"
PANELS = (
    Panel("keep-ratios", "by_keep_ratio", ("caption_loss",), "keep ratio", _LOSS),
    Panel("image-sizes", "by_image_size", ("caption-loss", "caption_loss"), _PIXELS, _LOSS),
    Panel("image-sizes", "by_image_size", ("knn", "top1"), _PIXELS, "k-NN top-1 (%)", 100.0),
)


def read_evaluation(path: Path) -> Mapping[str, Any]:
    """RUN/eval.json, or the file itself. Raises UserError."""
    file = path / EVAL_FILE if path.is_dir() else path
    return read_json(file, dict, "a result of `ov2 eval`")


def _name(evaluation: Path) -> str:
    path = evaluation.resolve()
    return path.stem if path.is_file() else path.name


def plot_robustness(paths: Sequence[Path], out: Path) -> None:
    """Image file: a panel for each curve that any of the evaluations has. Raises UserError."""
    names = _told_apart(paths, [_name(path) for path in paths])
    results = {name: read_evaluation(path) for name, path in zip(names, paths, strict=True)}
    panels = [panel for panel in PANELS if any(panel.points(result) for result in results.values())]
    if not panels:
        raise UserError(
            f"{', '.join(map(str, paths))}: no curve to draw; first run `ov2 eval --tasks keep-ratios,image-sizes "
            "--image-sizes ...`"
        )
    with figure(out, columns=len(panels), size=(4.6 * len(panels), 3.8)) as all_axes:
        draw_robustness(all_axes, panels, results)


def draw_robustness(
    all_axes: Sequence[Axes], panels: Sequence[Panel], results: Mapping[str, Mapping[str, Any]]
) -> None:
    """Each panel's points of each evaluation, by its name."""
    for axes, panel in zip(all_axes, panels, strict=True):
        for index, (name, result) in enumerate(results.items()):
            points = panel.points(result)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{index}", markersize=4, label=name)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.legend()

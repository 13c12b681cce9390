"""Curves of what an encoder loses with fewer tokens or another resolution, from the JSON of `ov2 eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError

EVAL_FILE = "eval.json"


@dataclass(frozen=True)
class Panel:
    """`task` and `table` lead to the rows by setting; `path` from a row to its number, drawn times `scale`."""

    task: str
    table: str
    path: tuple[str, ...]
    x_label: str
    y_label: str
    scale: float = 1.0

    def points(self, found: Mapping[str, Any]) -> list[tuple[float, float]]:
        rows = found.get(self.task, {}).get(self.table, {})
        return [(float(x), self.scale * y) for x, row in rows.items() if (y := _number(row, self.path)) is not None]


PANELS = (
    Panel(
        "keep-ratios", "by_keep_ratio", ("caption_loss",), "share of patch tokens kept", "caption loss (nats a token)"
    ),
    Panel(
        "image-sizes",
        "by_image_size",
        ("caption-loss", "caption_loss"),
        "resolution (px)",
        "caption loss (nats a token)",
    ),
    Panel("image-sizes", "by_image_size", ("knn", "top1"), "resolution (px)", "k-NN top-1 (%)", 100.0),
)


def _number(row: Any, path: Sequence[str]) -> float | None:
    for key in path:
        row = row.get(key, {}) if isinstance(row, Mapping) else {}
    return float(row) if isinstance(row, (int, float)) else None


def read_evaluation(path: Path) -> Mapping[str, Any]:
    """RUN/eval.json, or the file itself. Raises UserError."""
    file = path / EVAL_FILE if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no result of `ov2 eval` ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: no result of `ov2 eval`")
    return found


def plot_robustness(paths: Sequence[Path], out: Path) -> None:
    """PNG: a panel for each curve that any of the evaluations has. Raises UserError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = {path.resolve().stem if path.is_file() else path.resolve().name: read_evaluation(path) for path in paths}
    drawn = [panel for panel in PANELS if any(panel.points(one) for one in found.values())]
    if not drawn:
        raise UserError(
            f"{', '.join(map(str, paths))}: no curve; run `ov2 eval --tasks keep-ratios,image-sizes --image-sizes ...`"
        )
    figure, panels = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.8), layout="constrained", squeeze=False)
    for axes, panel in zip(panels.flat, drawn, strict=True):
        for index, (name, one) in enumerate(found.items()):
            points = panel.points(one)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{index}", markersize=4, label=name)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
    panels.flat[0].legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)

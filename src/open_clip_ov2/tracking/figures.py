"""Curves of one or more runs, from their results.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError

UNITS = {"caption_loss": "nats per token", "loss": "", "perplexity": "", "lr": "", "images_per_second": "images/s"}


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """Records of RUN/results.jsonl. A torn last line (a killed run) is left out. Raises UserError."""
    path = run_dir / "results.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir}: not the folder of a run (no results.jsonl in it)")
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON") from None
    if not records:
        raise UserError(f"{path}: empty")
    return records


def _series(records: list[dict[str, Any]], kind: str, metric: str) -> tuple[list[float], list[float]]:
    rows = [row for row in records if row["kind"] == kind and row.get(metric) is not None]
    return [row["samples_seen"] for row in rows], [row[metric] for row in rows]


def _smooth(values: list[float], share: float = 0.8) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else share * out[-1] + (1 - share) * value)
    return out


def plot_curves(run_dirs: Sequence[Path], out: Path, metric: str = "caption_loss") -> None:
    """PNG: training (light, smoothed) and validation (dots) of each run over samples seen. Raises UserError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    drawn = False
    for index, run_dir in enumerate(run_dirs):
        records, colour = read_results(run_dir), f"C{index}"
        name = run_dir.resolve().name
        x, y = _series(records, "train", metric)
        if x:
            axes.plot(x, _smooth(y), color=colour, alpha=0.4, label=f"{name}, training (smoothed)")
        x_val, y_val = _series(records, "val", metric)
        if x_val:
            axes.plot(x_val, y_val, "o-", color=colour, markersize=4, label=f"{name}, held out")
        drawn = drawn or bool(x or x_val)
        for before, after in pairwise(records):
            if before.get("stage") != after.get("stage"):
                axes.axvline(after["samples_seen"], color="grey", linestyle="--", linewidth=1)
    if not drawn:
        plt.close(figure)
        raise UserError(f"--metric {metric}: no run has it in its results.jsonl")
    unit = UNITS.get(metric, "")
    axes.set(xlabel="samples seen", ylabel=f"{metric.replace('_', ' ')}{f' ({unit})' if unit else ''}")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)

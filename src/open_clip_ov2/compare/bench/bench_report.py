"""What `ov2 bench` measured and what follows from it. The page is made of the document that bench.json holds.

Each row of `measured` is one variant in one case: `step_s`, seconds of a step by the clock, one a repetition, in their
order; `cpu_s`, of all processors together; `step_bytes`, the step's peak above weights, gradients and optimizer state,
which are `fixed_bytes`; `image_flops`, of an image and its caption. `failure` says why there is nothing else. A variant
is called `arm`, as in files since 0.1.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from typing import Any

from open_clip_ov2.compare.bench.settings import BenchSettings, Case, model_of
from open_clip_ov2.tracking.text_table import markdown

REFERENCE = "ov2"  # the variant that all others are compared with
MB, GFLOP, TFLOP = 1e6, 1e9, 1e12
COLUMNS = (
    "variant", "model", "ms a step", "images/s", "time / ov2", "CPU time / ov2", "step memory, MB", "memory / ov2",
    "GFLOP an image", "floor, ms", "MFU",
)  # fmt: skip
BEST = ("variant", "resolution", "precision", "best batch", "images/s", "ov2's / its", "MFU")
LARGEST = ("variant", "resolution", "precision", "largest batch", "ov2's / its")
Row = dict[str, Any]
Place = tuple[str, str, str]  # variant, resolution, precision, as the tables have them


def new_row(name: str, settings: BenchSettings, case: Case, failure: str | None = None) -> Row:
    """Of a variant that was not measured yet."""
    return {
        "arm": name, **asdict(case), "model": model_of(name, settings.model), "step_s": [], "cpu_s": [],
        "step_bytes": 0, "fixed_bytes": 0, "image_flops": 0.0, "failure": failure,
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the repetitions."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def add_figures(rows: Iterable[Row], peak_flops: float) -> None:
    """Add to the rows of one case what follows from them. `utilisation` is MFU, the share of the device's matrix rate,
    `peak_flops`; the ratios are how many times ov2's time, CPU time and step memory. Times are compared within each
    repetition: what slows the machine slows both."""
    timed = [row for row in rows if row["step_s"]]
    ours = next((row for row in timed if row["arm"] == REFERENCE), None)
    for row in timed:
        row["images_per_second"] = spread([row["batch_size"] / seconds for seconds in row["step_s"]])
        row["utilisation"] = row["images_per_second"]["median"] * row["image_flops"] / peak_flops
        if ours is not None:
            row["time_ratio"] = spread([a / b for a, b in zip(row["step_s"], ours["step_s"], strict=True)])
            row["cpu_time_ratio"] = spread([a / b for a, b in zip(row["cpu_s"], ours["cpu_s"], strict=True)])
            row["memory_ratio"] = row["step_bytes"] / ours["step_bytes"] if ours["step_bytes"] else None


def as_markdown(found: Mapping[str, Any]) -> str:
    """The page about a document of `run_bench`, which has the command and its date too."""
    settings, rows, machine = found["settings"], found["measured"], found["machine"]
    lengths = settings["caption_tokens"]
    blocks = [
        f"`{found['command']}`, {found['date']}",
        ", ".join(text if name == "device" else f"{name} {text}" for name, text in machine.items()),
        f"Captions of {lengths['low']} to {lengths['high']} tokens, mean {lengths['mean']:g}; median (least to "
        f"greatest) of {settings['repetitions']} repetitions of {settings['steps']} steps, variants in turns"
        f"{'; compiled' if settings['compile'] else ''}.",
    ]
    for (resolution, precision, batch), case in groupby(rows, itemgetter("resolution", "precision", "batch_size")):
        rate = found["peak_flops"].get(precision, 0.0)
        blocks.append(f"## {resolution} px, {precision}, batch {batch}")
        blocks.append(markdown([COLUMNS, *(_cells(row, rate) for row in case)]))
        if rate:
            blocks.append(f"Floor and MFU are relative to {rate / TFLOP:,.4g} TFLOP/s (measured matrix product).")
    if len({row["batch_size"] for row in rows}) > 1:
        blocks += ["## Each at its best batch", markdown([BEST, *_best(rows)])]
    if found["largest_batch"]:
        blocks += ["## Largest batch", markdown([LARGEST, *_largest(found["largest_batch"])])]
    return "\n\n".join(blocks) + "\n"


def _cells(row: Row, rate: float) -> list[str]:
    if not row["step_s"]:
        return [row["arm"], row["model"], row["failure"] or "not measured", *[""] * (len(COLUMNS) - 3)]
    return [
        row["arm"],
        row["model"],
        _spread_text(spread([1e3 * seconds for seconds in row["step_s"]]), "{:,.4g}"),
        f"{_speed(row):,.4g}",
        _spread_text(row.get("time_ratio"), "{:.2f}"),
        _spread_text(row.get("cpu_time_ratio"), "{:.2f}"),
        f"{row['step_bytes'] / MB:,.4g}",
        f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") else "",
        f"{row['image_flops'] / GFLOP:,.4g}",
        f"{1e3 * row['batch_size'] * row['image_flops'] / rate:,.4g}",
        f"{row['utilisation']:.1%}",
    ]


def _spread_text(values: Mapping[str, float] | None, form: str) -> str:
    if values is None:
        return ""
    low, middle, high = (form.format(values[name]) for name in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _speed(row: Row) -> float:
    return float(row["images_per_second"]["median"])


def _best(rows: Iterable[Row]) -> list[list[str]]:
    """Each variant at the batch of its most images/s."""
    best: dict[Place, Row] = {}
    for row in rows:
        if row["step_s"]:
            best[_place(row)] = max(best.get(_place(row), row), row, key=_speed)
    ratios = _ratios({place: _speed(row) for place, row in best.items()})
    return [
        [*place, str(row["batch_size"]), f"{_speed(row):,.4g}", ratios[place], f"{row['utilisation']:.1%}"]
        for place, row in best.items()
    ]


def _largest(rows: Iterable[Row]) -> list[list[str]]:
    sizes = {_place(row): row["batch_size"] for row in rows}
    ratios = _ratios(sizes)
    return [[*place, f"{size:,}", ratios[place]] for place, size in sizes.items()]


def _place(row: Row) -> Place:
    return row["arm"], f"{row['resolution']} px", row["precision"]


def _ratios(values: Mapping[Place, float]) -> dict[Place, str]:
    """How many times its own value ov2 has; empty where one of the two has none."""
    ours = {place: values.get((REFERENCE, *place[1:]), 0.0) for place in values}
    return {place: f"{ours[place] / value:.2f}" if ours[place] and value else "" for place, value in values.items()}

"""What the document and its tables show. Oracle: figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from open_clip_ov2.compare.bench.bench_report import Row, add_figures, as_markdown, new_row
from open_clip_ov2.compare.bench.settings import BenchSettings, Case

SMALL, LARGE = Case(84, "amp_bf16", 100), Case(84, "amp_bf16", 200)
SETTINGS = BenchSettings("X", ("ov2", "coca"), (84,), ("amp_bf16",), (100, 200), repetitions=3, steps=2)


def row(name: str, case: Case, step_s: list[float], cpu_s: list[float], step_bytes: int, image_flops: float) -> Row:
    timed = {"step_s": step_s, "cpu_s": cpu_s, "step_bytes": step_bytes, "image_flops": image_flops}
    return new_row(name, SETTINGS, case) | timed


def found() -> dict[str, Any]:
    small = [
        row("ov2", SMALL, [1.0, 2.0, 1.0], [2.0, 2.0, 2.0], 100_000_000, 5e9),
        row("coca", SMALL, [2.0, 6.0, 5.0], [4.0, 5.0, 6.0], 300_000_000, 1e10),
    ]
    large = [
        row("ov2", LARGE, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 200_000_000, 5e9),
        new_row("coca", SETTINGS, LARGE, "out of memory"),
    ]
    for rows in (small, large):
        add_figures(rows, 2e12)
    place = {"resolution": 84, "precision": "amp_bf16"}
    return {
        "command": "ov2 bench",
        "date": "2030-01-01",
        "machine": {"device": "a chip", "torch": "2.9"},
        "settings": asdict(SETTINGS),
        "peak_flops": {"amp_bf16": 2e12},
        "measured": [*small, *large],
        "largest_batch": [{"arm": "ov2", **place, "batch_size": 800}, {"arm": "coca", **place, "batch_size": 100}],
    }


def test_ratios_are_taken_within_repetitions() -> None:
    """A repetition in which the machine was slow slows both: 2/1, 6/2, 5/1."""
    ours, theirs, _, full = json.loads(json.dumps(found()["measured"]))
    assert theirs["step_s"] == [2.0, 6.0, 5.0]
    assert theirs["time_ratio"] == {"median": 3.0, "low": 2.0, "high": 5.0}
    assert theirs["cpu_time_ratio"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert theirs["memory_ratio"] == 3.0
    assert ours["images_per_second"] == {"median": 100.0, "low": 50.0, "high": 100.0}
    assert ours["utilisation"] == pytest.approx(100 * 5e9 / 2e12)
    where = (theirs["arm"], theirs["model"], theirs["resolution"], theirs["precision"], theirs["batch_size"])
    assert where == ("coca", "coca-of-X", 84, "amp_bf16", 100)
    assert full["failure"] == "out of memory"


def test_the_page_has_every_figure() -> None:
    page = as_markdown(found())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    # 100 images of 5 GFLOP at 2 TFLOP/s take 250 ms at the least.
    times = {
        "ov2": ["1,000 (1,000 to 2,000)", "100", "1.00 (1.00 to 1.00)", "1.00 (1.00 to 1.00)"],
        "coca": ["5,000 (2,000 to 6,000)", "20", "3.00 (2.00 to 5.00)", "2.50 (2.00 to 3.00)"],
    }
    assert ["ov2", "X", *times["ov2"], "100", "1.00", "5", "250", "25.0%"] in rows
    assert ["coca", "coca-of-X", *times["coca"], "300", "3.00", "10", "500", "10.0%"] in rows
    assert ["coca", "coca-of-X", "out of memory"] in [row[:3] for row in rows]
    assert ["ov2", "84 px", "amp_bf16", "200", "200", "1.00", "50.0%"] in rows  # at its best batch
    assert ["coca", "84 px", "amp_bf16", "100", "20", "10.00", "10.0%"] in rows
    assert ["coca", "84 px", "amp_bf16", "100", "8.00"] in rows  # the largest batch
    assert "a chip, torch 2.9" in page

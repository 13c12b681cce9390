"""What the tables show. Oracle: figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from open_clip_ov2.compare.bench.bench_report import Measured, Results, Spread, as_json, as_markdown
from open_clip_ov2.compare.bench.settings import BenchSettings, Case

SMALL, LARGE = Case(84, "amp_bf16", 100), Case(84, "amp_bf16", 200)
OURS = Measured("ov2", "X", SMALL, (1.0, 2.0, 1.0), (2.0, 2.0, 2.0), 100_000_000, 10, image_flops=5e9)
THEIRS = Measured("coca", "coca-of-X", SMALL, (2.0, 6.0, 5.0), (4.0, 5.0, 6.0), 300_000_000, 10, image_flops=1e10)
RESULTS = Results(
    (
        OURS,
        THEIRS,
        Measured("ov2", "X", LARGE, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), 200_000_000, 10, image_flops=5e9),
        Measured("coca", "coca-of-X", LARGE, failure="out of memory"),
    ),
    (("ov2", Case(84, "amp_bf16", 800)), ("coca", Case(84, "amp_bf16", 100))),
    {"amp_bf16": 2e12},
    {"device": "a chip", "torch": "2.9"},
)
SETTINGS = BenchSettings("X", ("ov2", "coca"), (84,), ("amp_bf16",), (100, 200), repetitions=3, steps=2)


def test_ratios_are_taken_within_repetitions() -> None:
    """A repetition in which the machine was slow slows both: 2/1, 6/2, 5/1."""
    assert RESULTS.ratios(THEIRS) == {
        "time_ratio": Spread(3.0, 2.0, 5.0), "cpu_time_ratio": Spread(2.5, 2.0, 3.0), "memory_ratio": 3.0,
    }  # fmt: skip
    assert OURS.images_per_second == Spread(100.0, 50.0, 100.0)
    assert OURS.mfu(2e12) == pytest.approx(100 * 5e9 / 2e12)


def test_the_page_has_every_figure() -> None:
    page = as_markdown(SETTINGS, RESULTS, "ov2 bench", "2030-01-01")
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


def test_json_has_what_was_measured() -> None:
    plain = json.loads(json.dumps(as_json(SETTINGS, RESULTS, "ov2 bench", "2030-01-01")))
    one = plain["measured"][1]
    assert one["step_s"] == [2.0, 6.0, 5.0]
    assert one["time_ratio"] == {"median": 3.0, "low": 2.0, "high": 5.0}
    assert one["cpu_time_ratio"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert (one["arm"], one["resolution"], one["precision"], one["batch_size"]) == ("coca", 84, "amp_bf16", 100)
    assert plain["measured"][3]["failure"] == "out of memory"
    assert plain["largest_batch"][0] == {"arm": "ov2", "resolution": 84, "precision": "amp_bf16", "batch_size": 800}

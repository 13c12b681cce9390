"""A variant in its own process; the largest batch. Oracles: the allocator, signals, a threshold known beforehand."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2.compare.bench.settings import CaptionLengths, Job
from open_clip_ov2.compare.bench.turns import OutOfMemory, Variant, largest, step_memory
from open_clip_ov2.errors import RunFailed, UserError

ARGV = (
    "--model", "ov2-bench-tiny", "--force-image-size", "16", "--batch-size", "4", "--precision", "fp32", "--device",
    "cpu", "--dataset-type", "synthetic", "--train-num-samples", "4",
)  # fmt: skip
JOB = Job("tiny", ARGV, "ov2-bench-tiny", "cpu", CaptionLengths(3, 8, 5.0), threads=1)


def test_how_a_process_ends_is_told_apart() -> None:
    """Oracle: the signals sent here. KILL is what Linux does to a process that takes too much memory."""
    with Variant(JOB) as first, Variant(JOB) as second:
        assert first.ask("facts")["image_flops"] == second.ask("facts")["image_flops"] > 0
        assert first.ask("memory")["step_bytes"] > 0
        for variant, number in ((first, signal.SIGKILL), (second, signal.SIGTERM)):
            assert variant._process.pid is not None
            os.kill(variant._process.pid, number)
        with pytest.raises(OutOfMemory):
            first.ask("memory")
        with pytest.raises(RunFailed, match="tiny: its process ended with exit status -15"):
            second.ask("memory")


def test_a_mistake_is_told_and_a_batch_that_does_not_fit_too() -> None:
    """Oracle: the allocator, which is asked for terabytes."""
    huge = replace(JOB, argv=tuple("10000000000" if word == "4" else word for word in ARGV))
    with Variant(replace(JOB, argv=("--model", "ov3", *ARGV[2:]))) as unknown, Variant(huge) as large:
        with pytest.raises(UserError, match="ov3"):
            unknown.ask("memory")
        with pytest.raises(OutOfMemory):
            large.ask("memory")


def test_the_memory_of_a_step_does_not_depend_on_the_process() -> None:
    """Oracle: the same job again."""
    assert step_memory(JOB) == step_memory(JOB) is not None


@given(st.integers(0, 5000), st.integers(1, 6000), st.integers(1, 64), st.integers(64, 4096))
def test_finds_the_threshold_and_asks_little(threshold: int, start: int, step: int, most: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= threshold

    found = largest(fits, start, step, most)
    assert found == min(threshold, most) // step * step
    assert len(asked) == len(set(asked)), "a size was tried twice"
    assert all(size % step == 0 and 0 < size <= most for size in asked)
    assert max(asked) <= max(2 * threshold, start, step)  # never far beyond what fits
    assert len(asked) <= 2 * math.log2(most / step + 2) + 2

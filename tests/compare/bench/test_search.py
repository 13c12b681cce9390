"""The largest batch. Oracle: a threshold that is known beforehand."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2.compare.bench.search import largest


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

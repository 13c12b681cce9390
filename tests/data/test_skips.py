"""Counting and logging of skips."""

from __future__ import annotations

import logging

import pytest

from open_clip_ov2.data import skips
from open_clip_ov2.data.skips import BAD_JSON, EMPTY_CAPTION, SkipCounter


def test_counts_are_exact_and_taken_once() -> None:
    """Oracle: counted by hand."""
    counter = SkipCounter()
    for number in range(7):
        counter.add(EMPTY_CAPTION, "txt", str(number), "a.tar")
    counter.add(BAD_JSON, "json", "7", "a.tar")
    assert counter.take() == {EMPTY_CAPTION: 7, BAD_JSON: 1}
    assert counter.take() == {}
    assert counter.total == {EMPTY_CAPTION: 7, BAD_JSON: 1}
    assert counter.example == "7 in a.tar: bad JSON (json)"
    counter.add_broken("a.tar", "why")
    counter.add(BAD_JSON, "json", "8", "a.tar")
    assert counter.example == "a.tar: broken shard (why)"


def test_log_is_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: five lines a cause with key, shard and reason; then one summary for each interval that has passed."""
    counter = SkipCounter()
    with caplog.at_level(logging.WARNING, logger=skips.__name__):
        for epoch in range(4):
            counter.begin()  # an epoch must not start the five lines anew
            for number in range(5000):
                counter.add(EMPTY_CAPTION if number % 2 else BAD_JSON, "why", f"key{epoch}", "some.tar")
        assert len(caplog.records) == 2 * skips.FIRST_LINES
        assert all("key0 in some.tar" in r.message and "(why)" in r.message for r in caplog.records)
        caplog.clear()
        monkeypatch.setattr(skips, "SUMMARY_EVERY_S", -1.0)  # each interval has passed
        counter.add(BAD_JSON, "why", "key", "some.tar")
    (record,) = caplog.records
    assert record.message.endswith("10001 bad JSON, 10000 empty caption")

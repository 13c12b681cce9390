"""Resuming on other numbers of processes and workers. Oracle: every key that was put in, once in each pass."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from broken_shards import good_tars
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from stopped_runs import (
    bad_and_good_tars,
    folder,
    loader,
    passes,
    saved,
    write_table,
)

from open_clip_ov2.data.loader import Batch, TrainLoader
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sources import Source, SyntheticSource


def emitted(loaders: list[TrainLoader], batches: int | None, seen: dict[int, Counter[str]]) -> int:
    """Takes so many batches (None: all) of each loader, of one sample each; keys by pass into `seen`."""
    taken = 0
    for made in loaders:
        iterator = iter(made)
        for batch in itertools.islice(iterator, batches):
            assert batch.positions
            (pass_index,) = passes(batch)
            seen.setdefault(pass_index, Counter())[batch.keys[0]] += 1
            taken += 1
    return taken


@limits(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=7),
    st.integers(1, 15),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 14)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from(["tars", "csv", "synthetic"]),
)
def test_changed_numbers_lose_nothing_and_repeat_nothing(
    sizes: list[int], buffer: int, runs: list[tuple[int, int]], last_world: int, kind: str
) -> None:
    """Any number of processes after any other, some stopped twice in one pass; every pass is looked at by itself.

    An epoch of many passes, so that all consumers finish the first one at least, however uneven their parts are.
    """
    total = sum(sizes)
    with folder() as path:
        source: Source = SyntheticSource(total, (8, 8))
        expected = Counter(f"synthetic {n}" for n in range(total))
        if kind == "tars":
            source = WebDatasetSource(bad_and_good_tars(path, sizes, bad_every=5))
            expected = Counter(f"{n:05d}" for n in range(1, total + 1) if n % 5)
        elif kind == "csv":
            source, expected = write_table(path, total), Counter(f"row {n + 1}" for n in range(total))
        seen: dict[int, Counter[str]] = {}
        states: list[dict[str, Any]] = []
        num_samples, taken = 6 * total, 0
        for world_size, batches in [*runs, (last_world, None)]:
            flags: dict[str, Any] = {"world_size": world_size, "batch_size": 1, "shuffle_buffer": buffer}
            loaders = [loader(source, rank=rank, num_samples=num_samples, **flags) for rank in range(world_size)]
            for made in loaders:
                if states:
                    assert made.resume(states) is (len(states) == world_size)
            taken += emitted(loaders, batches, seen)
            states = [saved(made.state()) for made in loaders]
        finished = min(position[0] for state in states for position in state["positions"])
        assert finished >= 1
        for pass_index in range(finished):
            assert seen[pass_index] == expected, pass_index
        assert all(max(counts.values()) == 1 for counts in seen.values())
        assert {state["samples_done"] for state in states} == {taken}
        assert taken >= num_samples


def test_changed_workers_and_batch_size(tmp_path: Path) -> None:
    """Two processes of two workers and batches of 2, then one of three and batches of 5: keys, and their number."""
    source = WebDatasetSource(bad_and_good_tars(tmp_path, [9, 8, 7, 9, 6, 8], 1000))
    usable = {f"{n:05d}" for n in range(1, 48)}
    flags: dict[str, Any] = {"num_samples": 400, "shuffle_buffer": 8, "accum_freq": 2}
    old = [loader(source, world_size=2, rank=rank, num_workers=2, batch_size=2, **flags) for rank in range(2)]
    batches: list[Batch] = []
    for made in old:
        iterator = iter(made)
        batches += [next(iterator) for _ in range(6)]
    new = loader(source, num_workers=3, batch_size=5, **flags)
    assert new.resume([saved(made.state()) for made in old]) is False
    rest = list(new)
    # 24 of 400 samples are over; 376 are 75.2 batches of 5, in updates of two.
    assert len(rest) == 76
    counts = Counter(key for batch in [*batches, *rest] for key in batch.keys)
    assert set(counts) == usable
    first_pass = [batch for batch in rest if passes(batch) == {0}]
    early = Counter(key for batch in [*batches, *first_pass] for key in batch.keys)
    assert max(early.values()) == 1
    assert max(counts.values()) - min(counts.values()) <= 3  # consumers go through their parts at their own pace


def test_as_many_consumers_with_other_batches_go_on_each_with_its_own(tmp_path: Path) -> None:
    """One process of two workers, then two of one: oracle: every key once in the pass."""
    source = WebDatasetSource(good_tars(tmp_path, [6, 6]))
    flags: dict[str, Any] = {"num_samples": 12, "batch_size": 1, "shuffle_buffer": 3}
    seen: dict[int, Counter[str]] = {}
    old = loader(source, num_workers=2, **flags)
    emitted([old], 5, seen)
    states = [saved(old.state())]
    new = [loader(source, world_size=2, rank=rank, num_workers=1, **flags) for rank in range(2)]
    for made in new:
        assert made.resume(states) is False
        assert made.num_batches - made.batches_done == 4  # ceil(7 / 2)
    emitted(new, None, seen)
    assert set(seen[0]) == {f"{n:05d}" for n in range(12)}
    assert max(seen[0].values()) == 1

"""A loader continues where one was stopped. Oracle throughout: the iteration that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from broken_shards import good_tars, sample, write_tar
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from stopped_runs import (
    SIZES,
    assert_continues,
    assert_same,
    bad_and_good_tars,
    folder,
    loader,
    passes,
    recorded,
    saved,
    stopped,
    write_table,
)

from open_clip_ov2.data import skips
from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sources import SyntheticSource
from open_clip_ov2.errors import UserError


@limits(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 12), st.integers(1, 4), st.integers(2, 5), st.data())
def test_a_stopped_run_sees_the_same_batches(
    sizes: list[int], buffer: int, batch_size: int, bad_every: int, data: st.DataObject
) -> None:
    """Several passes, bad samples and cut tars; skips are counted once."""
    with folder() as path:
        source = WebDatasetSource(bad_and_good_tars(path, sizes, bad_every))
        num_samples = data.draw(st.integers(1, 3 * sum(sizes)))

        def make() -> TrainLoader:
            return loader(source, num_samples=num_samples, batch_size=batch_size, shuffle_buffer=buffer)

        uninterrupted = make()
        batches = data.draw(st.integers(0, uninterrupted.num_batches))
        try:
            whole, states = recorded(uninterrupted, [batches])
        except UserError:
            return  # nothing usable in it
        resumed = assert_continues(make, states, batches, whole)
        assert resumed.skips == uninterrupted.skips
        assert resumed.state() == uninterrupted.state()


def test_what_came_before_speaks_against_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch of bad samples ends no run that had good ones before it was stopped. Oracle: the uninterrupted run."""
    monkeypatch.setattr(skips, "HOPELESS_S", -1.0)  # the time has passed
    monkeypatch.setattr(skips, "HOPELESS_SKIPS", 3)
    members = [sample(n, **({"png": b"bad"} if 4 <= n < 10 else {})) for n in range(14)]
    source = WebDatasetSource((str(write_tar(tmp_path / "0.tar", members)),))

    def make() -> TrainLoader:
        return loader(source, num_samples=8, shuffle_buffer=1)  # the order of the file

    whole, states = recorded(make(), [2])
    assert_continues(make, states, 2, whole)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_go_on_in_their_turns(tmp_path: Path, num_workers: int) -> None:
    """Stops at whole and at odd turns, and at the end; two stops in a row; the next epochs are whole."""
    source = WebDatasetSource(bad_and_good_tars(tmp_path, [5, 9, 3, 7, 4], 4))

    def make() -> TrainLoader:
        return loader(source, num_workers=num_workers, num_samples=70, batch_size=3, shuffle_buffer=6)

    uninterrupted = make()
    whole, states = recorded(uninterrupted, (1, 4, 10, 24))
    uninterrupted.set_epoch(1)
    following = list(uninterrupted)
    for batches in (1, 10, 24):
        resumed = assert_continues(make, states, batches, whole)
        resumed.set_epoch(1)
        assert resumed.batches_done == 0
        for old, new in zip(following, resumed, strict=True):
            assert_same(old, new)
    second, third = make(), make()
    second.resume([states[4]])
    third.resume([stopped(second, 7)])
    for old, new in zip(whole[11:], third, strict=True):
        assert_same(old, new)
    assert saved(third.state()) == states[24]


def test_prefetched_batches_do_not_count(tmp_path: Path) -> None:
    """The workers are ahead: torch asks each for two batches more than are taken."""
    source = WebDatasetSource(good_tars(tmp_path, [8, 8]))
    state = stopped(loader(source, num_workers=2, num_samples=64), 3)
    assert state["batches_done"] == 3
    assert state["positions"] == [[0, 4, state["positions"][0][2]], [0, 2, state["positions"][1][2]]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resampled_shards_with_weights(tmp_path: Path, num_workers: int) -> None:
    """Exact on the same number; on another one new draws, from the next pass on."""
    source = WebDatasetSource(good_tars(tmp_path, [3, 4, 5]), weights=(1.0, 2.0, 0.5), resampled=True)

    def make(**changed: Any) -> TrainLoader:
        return loader(source, num_workers=num_workers, num_samples=60, batch_size=3, shuffle_buffer=5, **changed)

    whole, at = recorded(make(), (0, 3, 8, 20))
    for batches in (0, 3, 8, 20):
        assert_continues(make, at, batches, whole)
    states = [stopped(make(world_size=2, rank=rank), 6) for rank in range(2)]
    alone = make()
    assert alone.resume(states) is False
    last_pass = max(position[0] for state in states for position in state["positions"])
    rest = list(alone)
    assert len(rest) == (60 - 36) // 3
    assert min(min(passes(batch)) for batch in rest) > last_pass
    again = make()
    assert again.resume([alone.state()]) is True  # all done
    assert list(again) == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["csv", "synthetic"])
def test_tables_and_synthetic_data(tmp_path: Path, kind: str, num_workers: int) -> None:
    source = write_table(tmp_path, 11) if kind == "csv" else SyntheticSource(11, (8, 8))

    def make() -> TrainLoader:
        return loader(source, num_workers=num_workers, num_samples=40, batch_size=3)

    whole, states = recorded(make(), (0, 1, 6, 13))
    for batches in (0, 1, 6, 13):
        assert_continues(make, states, batches, whole)


# --- cost, and what is refused -----------------------------------------------------------------------------


def test_finished_shards_are_not_read_again(tmp_path: Path) -> None:
    """Oracle: each shard is a command that writes down that it was opened."""
    log = tmp_path / "log"
    urls = tuple(f"pipe:echo {n} >> {log}; cat {path}" for n, path in enumerate(good_tars(tmp_path, [20] * 12)))
    source = WebDatasetSource(urls)

    def make() -> TrainLoader:
        return loader(source, num_samples=240, batch_size=4, shuffle_buffer=4)

    state = stopped(make(), 50)
    read = log.read_text().split()
    assert 10 <= len(read) == len(set(read)) <= 12
    log.unlink()
    resumed = make()
    resumed.resume([state])
    iterator = iter(resumed)
    next(iterator)
    again = log.read_text().split()
    assert len(again) <= 5  # the one being read, those with samples in a buffer of 4, and perhaps the next one
    assert set(again) & set(read) <= set(read[-5:])
    assert sum(len(batch.keys) for batch in iterator) == 240 - 200 - 4


def test_a_shard_that_shrank_is_counted(tmp_path: Path) -> None:
    """Oracle: a finished shard has lost the samples that waited in the buffer; the others come."""
    urls = good_tars(tmp_path, [6, 6])
    source = WebDatasetSource(urls)

    def make() -> TrainLoader:
        return loader(source, num_samples=12, batch_size=1, shuffle_buffer=100)

    state = stopped(make(), 2)
    assert state["positions"][0][2] == [6, 6]  # all of it is in the buffer
    for url in urls:
        write_tar(Path(url), [sample(0)])
    resumed = make()
    resumed.resume([state])
    next(iter(resumed))
    assert resumed.skips[skips.BROKEN_SHARD] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 4}, "--seed was 3 when the checkpoint was written and is 4 now"),
        ({"shuffle_buffer": 7}, "--shuffle-buffer was 5 .* is 7 now"),
        ({"shards": 2}, "--train-data was 3 shards .* is 2 shards now"),
        ({"order": -1}, r"--train-data was 3 shards .* is others \(3 shards\) now"),
        ({"resampled": True}, "was 3 shards when .* is 3 resampled shards now"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Oracle: one line with the flag, the old and the new value."""
    urls = good_tars(tmp_path, [3, 3, 3])
    state = stopped(loader(WebDatasetSource(urls), shuffle_buffer=5), 2)
    source = WebDatasetSource(urls[: change.pop("shards", 3)][:: change.pop("order", 1)])
    if change.pop("resampled", False):
        source = WebDatasetSource(urls, resampled=True)
    with pytest.raises(UserError, match=says) as error:
        loader(source, **{"shuffle_buffer": 5, **change}).resume([state])
    assert "\n" not in str(error.value)


def test_states_must_be_all_of_one_moment(tmp_path: Path) -> None:
    """Oracle: one line that says what is missing or mixed."""
    source = WebDatasetSource(good_tars(tmp_path, [3, 3]))
    states = [stopped(loader(source, world_size=2, rank=rank), 2) for rank in range(2)]
    new = loader(source)
    for wrong, says in (
        ([], "no data position"),
        (states[:1], "process 0 of 1, found that of process 0 of 2"),
        (states[::-1], "process 0 of 2, found that of process 1 of 2"),
        ([states[0], {**states[1], "batches_done": 1}], "mixes states of two different steps"),
        ([{**states[0], "version": 0}], "version 0"),
    ):
        with pytest.raises(UserError, match=says):
            new.resume(wrong)


def test_another_epoch_than_the_resumed_one_is_whole(tmp_path: Path) -> None:
    """Oracle: the loader that never resumed; and the resumed epoch a second time."""
    source = WebDatasetSource(good_tars(tmp_path, [5, 6]))
    state = stopped(loader(source), 2)
    resumed, plain = loader(source), loader(source)
    resumed.resume([state])
    resumed.set_epoch(0)  # the same one: nothing changes
    assert resumed.batches_done == 2
    assert len(list(resumed)) == 2
    assert len(list(resumed)) == 4
    resumed.resume([state])
    for made in (resumed, plain):
        made.set_epoch(3)
    for old, new in zip(plain, resumed, strict=True):
        assert_same(old, new)
    assert resumed.state() == plain.state()


def test_data_that_has_moved(tmp_path: Path) -> None:
    """The same tars in another folder, and other numbers of them. Oracle: the loader that stayed; the refusal."""
    here, there, more = (
        WebDatasetSource(tuple(str(path) for path in good_tars(tmp_path / name, sizes)))
        for name, sizes in (("here", [5, 5]), ("there", [5, 5]), ("more", [5, 5, 5]))
    )
    whole = list(loader(here, num_samples=8))
    state = stopped(loader(here, num_samples=8), 1)
    with pytest.raises(UserError, match="--train-data was"):
        loader(there, num_samples=8).resume([state])
    with pytest.raises(UserError, match=r"--train-data was 2 shards.*3 shards"):
        loader(more, num_samples=8).resume([state], moved=True)
    with pytest.raises(UserError, match=r"--seed was.*--override changes neither"):
        loader(there, num_samples=8, seed=77).resume([state], moved=True)
    moved = loader(there, num_samples=8)
    assert moved.resume([state], moved=True)
    assert [batch.keys for batch in moved] == [batch.keys for batch in whole[1:]]

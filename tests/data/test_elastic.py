"""--elastic: global batches are a function of seed and samples seen alone. Oracle: the order written out, in
`plain_batches`; for what is drawn of a sample, the one process that nobody stops."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_shards import good_tars
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from stopped_runs import bad_and_good_tars, folder, loader, passes, saved, write_table
from webdataset.filters import shuffle

from open_clip_ov2.core import KeepRatio, TokenDrop
from open_clip_ov2.data.loader import Batch, TrainLoader
from open_clip_ov2.data.order.layout import Layout, parse_elastic
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sources import Source
from open_clip_ov2.errors import UserError

SEED, BUFFER = 3, 4  # the seed of `settings` in broken_shards.py
Launch = tuple[int, int, int]  # processes, batches of each that make a step, data workers
PassOf = Callable[[int, int, int], list[str]]  # (stream, streams, pass) -> keys, as they stand in the shards


def plain_batches(
    keys_of: PassOf, buffer: int, bad: set[str], width: int, turns: int, part: int
) -> Iterator[list[str]]:
    """Keys of each global batch: all streams are written out, pass by pass, and dealt out in turns."""

    def stream(number: int) -> Iterator[str]:
        for index in itertools.count():
            rng = random.Random(f"{SEED}/0/{index}/samples/{number}")
            keys = shuffle(buffer, initial=buffer, rng=rng)(iter(keys_of(number, width * turns, index)))
            yield from (key for key in keys if key not in bad)

    streams = [stream(number) for number in range(width * turns)]
    for step in itertools.count():
        yield [next(streams[u * turns + step % turns]) for u in range(width) for _ in range(part)]


def order(what: str, index: int, count: int) -> list[int]:
    numbers = list(range(count))
    random.Random(f"{SEED}/0/{index}/{what}").shuffle(numbers)
    return numbers


def launches(elastic: tuple[int, int], total: int, most_workers: int) -> list[Launch]:
    """Those that can have the batches of `elastic`."""
    found = []
    for launch in itertools.product(range(1, elastic[0] + 1), range(1, 9), range(most_workers + 1)):
        processes, accum_freq, workers = launch
        try:
            assert total % (processes * accum_freq) == 0
            Layout.of(elastic, total // processes // accum_freq, accum_freq, processes, workers)
        except (AssertionError, UserError):
            continue
        found.append(launch)
    return found


def rows(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """What each sample became: key, pixels, ids, caption, seed, and its batch's draw."""
    return sorted(
        (key, image.numpy().tobytes(), ids.tolist(), caption, seed, batch.draw)
        for batch in batches
        for key, image, ids, caption, seed in zip(
            batch.keys, batch.images_BCHW, batch.texts_BL, batch.captions, batch.seeds, strict=True
        )
    )


class Case:
    """Shards in a folder, some samples of which are bad, a loader of them, and their order written out."""

    def __init__(self, path: Path, elastic: tuple[int, int], part: int, kind: str, sizes: list[int], bad_every: int):
        (self.width, turns), self.elastic, self.total = elastic, elastic, elastic[0] * part
        starts = [sum(sizes[:index]) + 1 for index in range(len(sizes))]
        shards = [[f"{n:05d}" for n in range(start, start + size)] for start, size in zip(starts, sizes, strict=True)]
        weights = tuple(1.0 + index % 3 for index in range(len(sizes))) if kind == "mixture" else None
        is_csv, bad, samples = kind == "csv", set[str](), sum(sizes)

        def keys_of(stream: int, streams: int, index: int) -> list[str]:
            if is_csv:
                return [f"row {row + 1}" for row in order("rows", index, samples)[stream::streams]]
            drawn = order("shards", index, len(sizes))[stream::streams]
            if weights:
                rng, each = random.Random(f"{SEED}/0/{index}/resampled/{stream}"), max(1, len(sizes) // streams)
                drawn = rng.choices(range(len(sizes)), weights=weights, k=each)
            return [key for shard in drawn for key in shards[shard]]

        if is_csv:
            self.source: Source = write_table(path, samples)
        else:
            bad = {key for keys in shards for key in keys if int(key) % bad_every == 0}
            self.source = WebDatasetSource(bad_and_good_tars(path, sizes, bad_every), weights, weights is not None)
        self.plain = plain_batches(keys_of, 1 if is_csv else BUFFER, bad, self.width, turns, part)

    def loader(self, launch: Launch, rank: int) -> TrainLoader:
        processes, accum_freq, workers = launch
        return loader(
            self.source, rank=rank, world_size=processes, accum_freq=accum_freq, num_workers=workers,
            batch_size=self.total // processes // accum_freq, num_samples=20 * self.total, shuffle_buffer=BUFFER,
            elastic=self.elastic,
        )  # fmt: skip

    def steps(self, launch: Launch, states: list[Any], steps: int) -> tuple[list[list[Batch]], list[Any]]:
        """So many steps, each as the batches of all processes in order; and the states at the end."""
        loaders = [self.loader(launch, rank) for rank in range(launch[0])]
        assert all(made.resume(states) for made in loaders if states)
        iterators = [iter(made) for made in loaders]
        taken = [[batch for one in iterators for batch in itertools.islice(one, launch[1])] for _ in range(steps)]
        found = [saved(made.state()) for made in loaders]
        for made in loaders:
            made.close()
        return taken, found

    def check(self, segments: list[tuple[Launch, int]]) -> None:
        """Launch after launch, each from where the one before was stopped."""
        alone, _ = self.steps((1, 1, 0), [], sum(steps for _, steps in segments))
        whole, states = iter(alone), list[Any]()
        for launch, steps in segments:
            taken, states = self.steps(launch, states, steps)
            for batches in taken:
                keys, plain = [key for batch in batches for key in batch.keys], next(self.plain)
                if self.width // launch[0] >= launch[1]:  # otherwise the batches of a process split a stream's part
                    assert keys == plain
                assert sorted(keys) == sorted(plain)
                assert rows(batches) == rows(next(whole))


@limits(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (4, 2), (6, 1)]),
    st.integers(1, 3),
    st.sampled_from(["tars", "mixture", "csv"]),
    st.integers(2, 5),
    st.data(),
)
def test_global_batches_are_the_same_on_any_launches(
    elastic: tuple[int, int], part: int, kind: str, bad_every: int, data: st.DataObject
) -> None:
    """Any processes and accumulation, changed as often as one likes; broken samples; several sources."""
    streams, possible = elastic[0] * elastic[1], launches(elastic, elastic[0] * part, most_workers=0)
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=streams, max_size=streams + 2))
    segments = data.draw(st.lists(st.tuples(st.sampled_from(possible), st.integers(1, 3)), min_size=2, max_size=3))
    with folder() as path:
        Case(path, elastic, part, kind, sizes, bad_every).check(segments)


def test_data_workers_change_nothing(tmp_path: Path) -> None:
    """Real ones: four in one process; one in each of two; two that split parts of a stream."""
    case = Case(tmp_path, (2, 4), 4, "tars", [4, 3, 5, 3, 4, 2, 3, 4], 3)
    case.check([((1, 1, 4), 3), ((2, 1, 1), 2), ((1, 4, 2), 1)])


@limits(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 20), st.randoms(use_true_random=False))
def test_every_stream_is_one_workers_alone(width: int, turns: int, part: int, begin: int, rng: random.Random) -> None:
    """Whatever batch a launch begins with. Oracle: sets; each batch is full, and a global batch has equal parts of the
    streams of its turn."""
    possible = launches((width, turns), width * part, most_workers=4)
    for processes, accum_freq, workers in rng.sample(possible, min(3, len(possible))):
        cut = Layout.of((width, turns), width * part // processes // accum_freq, accum_freq, processes, workers)
        owners: dict[int, set[tuple[int, int]]] = {}
        for step in range(begin, begin + 2 * turns):
            counts: Counter[int] = Counter()
            for rank, micro in itertools.product(range(processes), range(accum_freq)):
                number = step * accum_freq + micro
                streams, samples = cut.pieces(rank, number)
                assert len(streams) * samples == cut.batch_size
                counts.update(dict.fromkeys(streams, samples))
                for stream in streams:
                    owners.setdefault(stream, set()).add((rank, (number - begin * accum_freq) % max(1, workers)))
                    assert stream // (cut.streams // processes) == rank
            assert counts == {u * turns + step % turns: part for u in range(width)}
        assert all(len(found) == 1 for found in owners.values())


@pytest.mark.parametrize(
    ("elastic", "launch", "says"),
    [
        ("8x2", (16, 1, 6, 2), "6 processes; expected a number that divides 8"),
        ("8x2", (3, 1, 4, 2), "global batch, 12, is not divisible by 8"),
        ("8x2", (8, 3, 4, 2), "each process has 2, and accumulates 3"),
        ("8x2", (8, 1, 8, 4), "--workers 4 for each of 8 processes.*divides 2"),
        ("8x2", (2, 8, 2, 8), "--workers 8 for each of 2 processes with --accum-freq 8.*divides 4"),
        ("8", (), "the most processes and data workers of each"),
        ("0x2", (), "for example 64x8"),
    ],
)
def test_what_cannot_be_kept_is_refused(elastic: str, launch: tuple[int, ...], says: str) -> None:
    """Oracle: one line with what would do."""
    with pytest.raises(UserError, match=says) as error:
        Layout.of(parse_elastic(elastic), *launch)
    assert "\n" not in str(error.value)


def test_another_elastic_loses_nothing(tmp_path: Path) -> None:
    """Other streams or another global batch than before (--override): oracle: every key once in the pass."""
    source = WebDatasetSource(good_tars(tmp_path, [5] * 8))
    flags: dict[str, Any] = {"num_samples": 40, "shuffle_buffer": BUFFER}
    for elastic, batch_size in (((4, 1), 8), ((2, 4), 4), ((4, 1), 4), (None, 4)):
        old, seen = loader(source, elastic=(2, 2), batch_size=4, **flags), list[str]()
        seen += [key for batch in itertools.islice(old, 3) for key in batch.keys]
        new = loader(source, elastic=elastic, batch_size=batch_size, **flags)
        assert new.resume([saved(old.state())]) is False
        seen += [key for batch in new if passes(batch) == {0} for key in batch.keys]
        assert max(Counter(seen).values()) == 1


def test_tokens_kept_of_samples() -> None:
    """Oracle: the same rows in another batch; the share of each token over many; the ratio at its draw."""
    drop, seeds_B = TokenDrop(KeepRatio.of("0.25:1")), torch.arange(4000) * 7919 + (5 << 32)
    kept_idx = drop.of_samples(seeds_B, 20, draw=1 / 3)["kept_idx"]
    assert kept_idx.shape == (4000, 10)
    assert torch.equal(kept_idx[1000:], drop.of_samples(seeds_B[1000:], 20, draw=1 / 3)["kept_idx"])
    counts = torch.bincount(kept_idx.flatten(), minlength=20)
    assert counts.sub(2000).abs().max() < 5 * (4000 * 0.25) ** 0.5
    together = torch.zeros(4000, 20).scatter_(1, kept_idx, 1.0).sub(0.5)
    assert (together.T @ together / 4000 - 0.25 * torch.eye(20)).abs().max() < 0.03  # -1/76 for draws of exactly half
    assert drop.of_samples(seeds_B, 20, draw=1.0) == {"keep_ratio": 1.0}

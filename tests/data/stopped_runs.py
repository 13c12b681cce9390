"""Loaders that are stopped and resumed."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from broken_shards import byte_tokens, cut, picture, random_crop, sample, settings, write_tar
from hypothesis import strategies as st

from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import Batch, TrainLoader
from open_clip_ov2.data.sources import CsvSource, Source

KEYS = parse_caption_keys("txt=0.6,json:alt=0.4")
SIZES = st.lists(st.integers(0, 9), min_size=4, max_size=8).filter(sum)


def loader(source: Source, **changed: Any) -> TrainLoader:
    return TrainLoader(source, random_crop, byte_tokens, **settings(**{"caption_keys": KEYS, **changed}))


def passes(batch: Batch) -> set[int]:
    """The passes that a batch is of."""
    return {position.pass_index for position in batch.positions.values()}


def assert_same(old: Batch, new: Batch) -> None:
    assert torch.equal(old.images_BCHW, new.images_BCHW)
    assert torch.equal(old.texts_BL, new.texts_BL)
    assert (old.keys, old.captions, old.skipped, old.positions) == (new.keys, new.captions, new.skipped, new.positions)


def stopped(made: TrainLoader, batches: int) -> dict[str, Any]:
    """State after so many batches, as a checkpoint gives it back."""
    iterator = iter(made)
    for _ in range(batches):
        next(iterator)
    return saved(made.state())


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Oracle of "plain": both JSON and a weights_only torch file give back what went in."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == state == json.loads(json.dumps(state))
    return json.loads(json.dumps(state))


def recorded(made: TrainLoader, stops: Iterable[int]) -> tuple[list[Batch], dict[int, dict[str, Any]]]:
    """All batches of a loader that is not stopped, and its states after so many of them."""
    states = {0: saved(made.state())}
    batches: list[Batch] = []
    for batch in made:
        batches.append(batch)
        if len(batches) in stops:
            states[len(batches)] = saved(made.state())
    return batches, states


def assert_continues(
    make: Callable[[], TrainLoader], states: dict[int, dict[str, Any]], batches: int, whole: list[Batch]
) -> TrainLoader:
    """A loader that resumes after so many batches gives the rest of `whole`."""
    resumed = make()
    assert resumed.resume([states[batches]]) is True
    assert resumed.batches_done == batches
    rest = list(resumed)
    assert len(rest) == len(whole) - batches
    for old, new in zip(whole[batches:], rest, strict=True):
        assert_same(old, new)
    assert resumed.batches_done == len(whole)
    return resumed


@contextmanager
def folder() -> Iterator[Path]:
    """For each example of hypothesis."""
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def bad_and_good_tars(path: Path, sizes: list[int], bad_every: int) -> tuple[str, ...]:
    """Tars of samples with two captions; each `bad_every`-th has no picture, each third tar is cut in its last sample.

    A sample is six blocks: cutting the end of archive (two and more) and one block leaves the last without its json.
    """
    names, number = [], 0
    for index, size in enumerate(sizes):
        members = []
        for _ in range(size):
            number += 1
            alt = {"json": json.dumps({"alt": f"other {number}"}).encode()}
            members.append(sample(number, **alt, **({"png": b"bad"} if number % bad_every == 0 else {})))
        path_of_tar = write_tar(path / f"{index}.tar", members)
        if index % 3 == 2 and size:
            cut(path_of_tar, size * 3072 - 700)
        names.append(str(path_of_tar))
    return tuple(names)


def write_table(path: Path, rows: int) -> CsvSource:
    (path / "a.png").write_bytes(picture())
    (path / "t.csv").write_text("file,txt\n" + "".join(f"a.png,row {n}\n" for n in range(rows)))
    return CsvSource(path / "t.csv", separator=",", image_column="file", caption_columns=("txt",))

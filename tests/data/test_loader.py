"""Training and evaluation batches as a whole, and the warning when none comes."""

from __future__ import annotations

import io
import itertools
import logging
import random
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_shards import TXT, byte_tokens, good_tars, random_crop, settings, to_tensor
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image
from stopped_runs import passes

from open_clip_ov2.data.loader import Batch, EvalLoader, TrainLoader
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sources import SyntheticSource
from open_clip_ov2.errors import UserError


def train(source: Any, **changed: Any) -> TrainLoader:
    return TrainLoader(source, random_crop, byte_tokens, **settings(**changed))


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@limits(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_batches_are_whole_updates_whatever_the_workers(
    num_samples: int, batch_size: int, world_size: int, accum_freq: int, num_workers: int
) -> None:
    """Oracle: counting up in updates until the samples are covered."""
    source = SyntheticSource(num_samples=100, image_size=(1, 1))
    sizes = {"batch_size": batch_size, "world_size": world_size, "accum_freq": accum_freq}
    loader = train(source, num_samples=num_samples, num_workers=num_workers, **sizes)
    updates = next(n for n in itertools.count(1) if n * batch_size * world_size * accum_freq >= num_samples)
    assert loader.num_batches == len(loader) == updates * accum_freq
    assert loader.num_samples == loader.num_batches * batch_size * world_size


def test_fewer_than_one_sample_is_an_error() -> None:
    """Oracle: the flag's name."""
    with pytest.raises(UserError, match="--train-num-samples"):
        train(SyntheticSource(9, (1, 1)), num_samples=0)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_an_epoch_is_full_batches_and_a_pass_has_every_sample(tmp_path: Path, num_workers: int) -> None:
    """Oracle: the keys. With 7 batches for 2 or 3 workers the shares are uneven."""
    source = WebDatasetSource(good_tars(tmp_path, [7, 7, 7, 7, 7, 7]))
    loader = train(source, num_workers=num_workers, num_samples=42, batch_size=6)
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch.keys) for batch in batches] == [6] * 7
        assert all(batch.images_BCHW.shape == (6, 3, 6, 6) and batch.texts_BL.shape == (6, 16) for batch in batches)
        epochs.append(keys(batches))
    if not num_workers:
        assert sorted(epochs[0]) == sorted(epochs[1]) == [f"{n:05d}" for n in range(42)]
    assert epochs[0] != epochs[1]
    loader.set_epoch(0)
    assert keys(list(loader)) == epochs[0]


def test_crops_and_captions_are_the_samples_own(tmp_path: Path) -> None:
    """Oracle: the same sample on other numbers of workers and processes; nobody's generator moves."""
    source = WebDatasetSource(good_tars(tmp_path, [4, 4, 4, 4]))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    crops: dict[str, set[bytes]] = {}
    for world_size, num_workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
        for rank in range(world_size):
            flags = {"world_size": world_size, "num_workers": num_workers, "rank": rank, "batch_size": 1}
            for batch in train(source, num_samples=16, **flags):
                assert batch.positions
                if passes(batch) == {0}:
                    crops.setdefault(batch.keys[0], set()).add(batch.images_BCHW.numpy().tobytes())
    assert len(crops) == 16
    assert all(len(seen) == 1 for seen in crops.values())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_once(tmp_path: Path, num_workers: int, world_size: int) -> None:
    """Oracle: all keys, in file order where there is one reader; each share in batches, the last one partial."""
    source = WebDatasetSource(good_tars(tmp_path, [4, 1, 6]))
    flags: dict[str, Any] = {"batch_size": 2, "num_workers": num_workers, "caption_keys": TXT}
    got = []
    for rank in range(world_size):
        loader = EvalLoader(source, to_tensor, byte_tokens, rank=rank, world_size=world_size, **flags)
        got += keys(list(loader))
        whole = keys(list(loader.full())) if not rank else []
    assert sorted(got) == [f"{n:05d}" for n in range(11)]
    if num_workers == 0:
        assert keys(list(EvalLoader(source, to_tensor, byte_tokens, **flags))) == sorted(got)
    assert sorted(whole or got) == sorted(got)
    few = [
        key
        for rank in range(world_size)
        for key in keys(
            list(EvalLoader(source, to_tensor, byte_tokens, rank=rank, world_size=world_size, num_samples=5, **flags))
        )
    ]
    assert sorted(few) == [f"{n:05d}" for n in range(5)]


def stalling(folder: Path, pause: str) -> str:
    """A shard that stops in its middle for a while."""
    (path,) = good_tars(folder, [12])
    return f"pipe:head -c 9000 {path}; sleep {pause}; tail -c +9001 {path}"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stall_is_warned_of_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int) -> None:
    """Oracle: the shard's name in the warnings, more than one for a long stall; then everything comes all the same."""
    others = set(threading.enumerate())  # of iterations that other tests have left to the garbage collector
    url = stalling(tmp_path / "slow", "1.5")
    source = WebDatasetSource((url, *good_tars(tmp_path / "fast", [6])))
    loader = train(source, num_workers=num_workers, num_samples=18, stall_warning_s=0.2)
    with caplog.at_level(logging.WARNING, logger="open_clip_ov2.data.receive"):
        assert len(keys(list(loader))) == 18
    lines = [record.getMessage() for record in caplog.records if record.name == "open_clip_ov2.data.receive"]
    assert len(lines) >= 2
    assert all("no batch for" in line for line in lines)
    assert lines[-1].endswith(f"reads {url}")
    mine = [thread for thread in set(threading.enumerate()) - others if thread.name == "data-stall"]
    assert not [thread for thread in mine if thread_lasts(thread)]


def thread_lasts(thread: threading.Thread) -> bool:
    """It has been told to end; it is given time."""
    thread.join(10)
    return thread.is_alive()


def test_no_stall_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: a consumer that is slow itself is no stall of the data."""
    loader = train(WebDatasetSource(good_tars(tmp_path, [12])), num_samples=12, stall_warning_s=0.1)
    with caplog.at_level(logging.WARNING, logger="open_clip_ov2.data.receive"):
        for _ in loader:
            threading.Event().wait(0.15)
    assert not [record for record in caplog.records if record.name == "open_clip_ov2.data.receive"]


def test_a_name_that_is_not_utf8_is_a_name_like_others(tmp_path: Path) -> None:
    """A tar keeps the bytes that a name had where it was made. Oracle: the names, in one epoch."""
    names = [b"caf\xe9", b"na\xefve", b"plain"]
    files = {name.decode("utf-8", "surrogateescape"): named_picture(index) for index, name in enumerate(names)}
    tar = tmp_path / "caf\udce9.tar"
    with tarfile.open(tar, "w", encoding="utf-8", errors="surrogateescape") as out:
        for stem, image in files.items():
            for suffix, data in ((".png", image), (".txt", b"x")):
                info = tarfile.TarInfo(stem + suffix)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    source = WebDatasetSource((str(tar),))
    assert sorted(keys(list(train(source, num_samples=3, batch_size=3)))) == sorted(files)
    assert source.fingerprint()["shards"] == 1


def named_picture(index: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (index, 0, 0)).save(out, "PNG")
    return out.getvalue()

"""Deliberately broken shards, and workers that die. Oracle: the counts are known, because the shards are made here."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from broken_shards import (
    Member,
    byte_tokens,
    cut,
    giant_png,
    good_tars,
    kill_own_worker,
    picture,
    sample,
    settings,
    to_tensor,
    workers_of,
    write_tar,
)
from PIL import Image

from open_clip_ov2.data import skips
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import Batch, EvalLoader, TrainLoader
from open_clip_ov2.data.receive import worker_death
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.errors import UserError

KEYS = parse_caption_keys("json:recaption,txt")
UNLUCKY = 13  # px


def tokenize(texts: list[str]) -> torch.Tensor:
    if any("untokenizable" in text for text in texts):
        raise ValueError("no such word")
    return byte_tokens(texts)


def transform(image: Image.Image) -> torch.Tensor:
    if image.width == UNLUCKY:
        raise RuntimeError("unlucky")
    return to_tensor(image.resize((4, 4)))


BAD: dict[str, tuple[str, Callable[[int], list[Member]]]] = {
    "corrupt jpeg": (skips.UNDECODABLE_IMAGE, lambda n: sample(n, png=None, jpg=b"\xff\xd8\xff not a jpeg")),
    "cut jpeg": (skips.UNDECODABLE_IMAGE, lambda n: sample(n, png=None, jpg=picture(0, "jpeg", 64)[:400])),
    "no image": (skips.MISSING_IMAGE, lambda n: sample(n, png=None)),
    "no caption": (skips.MISSING_CAPTION, lambda n: sample(n, txt=None)),
    "no such json field": (skips.MISSING_CAPTION, lambda n: sample(n, txt=None, json=b'{"other": "x"}')),
    "empty caption": (skips.EMPTY_CAPTION, lambda n: sample(n, txt=b"")),
    "blank caption": (skips.EMPTY_CAPTION, lambda n: sample(n, txt=b" \n\t ")),
    "bad utf-8": (skips.BAD_UTF8, lambda n: sample(n, txt=b"caf\xe9")),
    "bad json": (skips.BAD_JSON, lambda n: sample(n, txt=None, json=b'{"recaption": ')),
    "number in json": (skips.BAD_JSON, lambda n: sample(n, txt=None, json=json.dumps({"recaption": 3}).encode())),
    "20,000 px": (skips.TOO_MANY_PIXELS, lambda n: sample(n, png=giant_png())),
    "transform": (skips.TRANSFORM_FAILED, lambda n: sample(n, png=picture(side=UNLUCKY))),
    "tokenizer": (skips.TOKENIZER_FAILED, lambda n: sample(n, txt=b"untokenizable")),
}
CAUSES = dict(Counter(cause for cause, _ in BAD.values()))


def mixed_tar(folder: Path) -> WebDatasetSource:
    """Each bad sample followed by a good one, numbered from 100 on."""
    samples = [members for n, (_, bad) in enumerate(BAD.values()) for members in (bad(n), sample(100 + n))]
    return WebDatasetSource((str(write_tar(folder / "mixed.tar", samples)),))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_sample_is_skipped_and_counted_by_cause(tmp_path: Path, num_workers: int) -> None:
    loader = EvalLoader(
        mixed_tar(tmp_path), transform, tokenize, batch_size=4, num_workers=num_workers, caption_keys=KEYS
    )
    captions = [caption for batch in loader for caption in batch.captions]
    assert sorted(captions) == [f"caption {100 + n}" for n in range(len(BAD))]
    assert loader.skips == CAUSES


def test_training_counts_them_too_and_goes_on(tmp_path: Path) -> None:
    """One pass has 13 good samples; a bad one that the shuffle puts behind them all is not looked at."""
    loader = TrainLoader(
        mixed_tar(tmp_path), transform, tokenize, **settings(num_samples=13, batch_size=1, caption_keys=KEYS)
    )
    batches = list(loader)
    assert sorted(batch.captions[0] for batch in batches) == [f"caption {100 + n}" for n in range(13)]
    assert all(loader.skips.get(cause, 0) <= count for cause, count in CAUSES.items())
    assert sum(loader.skips.values()) >= 6
    assert set(loader.skips) <= set(CAUSES)


@pytest.mark.parametrize("whole_samples", [0, 1, 3])
def test_a_truncated_tar_gives_what_came_before(tmp_path: Path, whole_samples: int) -> None:
    """A sample is four blocks of 512 bytes: header, picture of 12 px, header, text. The cut is in the next picture."""
    good = good_tars(tmp_path / "good", [6, 6])
    broken = [
        cut(write_tar(tmp_path / f"cut{i}.tar", [sample(100 * i + n) for n in range(6)]), 2048 * whole_samples + 700)
        for i in (1, 2)
    ]
    source = WebDatasetSource((str(broken[0]), good[0], str(broken[1]), good[1]))
    loader = EvalLoader(source, transform, tokenize, batch_size=4, num_workers=0, caption_keys=KEYS)
    captions = [caption for batch in loader for caption in batch.captions]
    heads = [100 * i + n for i in (1, 2) for n in range(whole_samples)]
    assert sorted(captions) == sorted(f"caption {n}" for n in [*range(12), *heads])
    assert loader.skips == {skips.BROKEN_SHARD: 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_all_broken_list_is_an_error(tmp_path: Path, num_workers: int) -> None:
    paths = [str(write_tar(tmp_path / f"{i}.tar", [sample(n, txt=b"") for n in range(5)])) for i in range(3)]
    (tmp_path / "garbage.tar").write_bytes(b"this is no tar" * 100)
    bad = WebDatasetSource((*paths, str(tmp_path / "garbage.tar")))
    with pytest.raises(UserError, match=r"no usable sample .*empty caption") as caught:
        list(TrainLoader(bad, transform, tokenize, **settings(num_workers=num_workers)))
    assert "\n" not in str(caught.value)
    loader = EvalLoader(
        WebDatasetSource(tuple(paths)), transform, tokenize, batch_size=4, num_workers=num_workers, caption_keys=KEYS
    )
    with pytest.raises(UserError, match=r"no usable sample \(15 empty caption"):
        list(loader)


def to_the_end(batches: Iterator[Batch]) -> None:
    """As a training loop does it: torch's signal handler may raise between two batches, too."""
    try:
        for _ in batches:
            pass
    except RuntimeError as error:
        raise worker_death(error) or error from error


def test_a_killed_worker_is_a_clear_error(tmp_path: Path) -> None:
    source = WebDatasetSource(good_tars(tmp_path, [6]))
    loader = TrainLoader(source, transform, tokenize, **settings(num_workers=1, num_samples=100_000))
    batches, (worker,) = workers_of(lambda: iter(loader))
    next(batches)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker died \(.*--workers"):
        to_the_end(batches)


def test_a_worker_that_kills_itself_is_a_clear_error(tmp_path: Path) -> None:
    """As the kernel does it when memory runs out while a picture is decoded."""
    source = WebDatasetSource(good_tars(tmp_path, [6]))
    with pytest.raises(UserError, match=r"a data worker died \(.*--workers"):
        to_the_end(iter(TrainLoader(source, kill_own_worker, tokenize, **settings(num_workers=1))))


def test_signals_to_all_processes_leave_the_workers_alone(tmp_path: Path) -> None:
    """A scheduler signals workers too. Oracle: all batches, from the workers that were there at the start."""
    source = WebDatasetSource(good_tars(tmp_path, [6, 6]))
    loader = TrainLoader(source, transform, tokenize, **settings(num_workers=2, num_samples=200))
    batches, workers = workers_of(lambda: iter(loader))
    assert len(workers) == 2
    got = [next(batches), next(batches)]
    for worker in workers:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, name)
    assert len([*got, *batches]) == loader.num_batches == 100


def test_log_lines_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "0.tar", [*(sample(n, png=b"bad") for n in range(200)), sample(200)])
    loader = EvalLoader(
        WebDatasetSource((str(path),)), transform, tokenize, batch_size=4, num_workers=0, caption_keys=KEYS
    )
    with caplog.at_level(logging.WARNING):
        list(loader)
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == skips.FIRST_LINES
    assert "00000 in" in lines[0]
    assert "undecodable image" in lines[0]
    assert loader.skips == {skips.UNDECODABLE_IMAGE: 200}

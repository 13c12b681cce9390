"""Lists of shards, their order, their weights, and closing them."""

from __future__ import annotations

import gc
import gzip
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
from broken_shards import good_tars, sample, write_tar

from open_clip_ov2.data.order.assignment import Assignment
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.skips import BROKEN_SHARD, SkipCounter
from open_clip_ov2.errors import UserError


def share(**changed: int) -> Assignment:
    usual = {"seed": 0, "epoch": 0, "pass_index": 0, "consumer": 0, "consumers": 1, "shuffle_buffer": 4}
    return Assignment(**{**usual, **changed})


def keys(source: WebDatasetSource, **changed: int) -> list[str]:
    return [raw["__key__"] for raw in source.train_samples(share(**changed), SkipCounter())]


def test_braces_parts_and_weights(tmp_path: Path) -> None:
    """Oracle: the list, written out."""
    for name in ("a0", "a1", "b7"):
        write_tar(tmp_path / f"{name}.tar", [])
    urls, weights = expand_shards(f"{tmp_path}/a{{0..1}}.tar::{tmp_path}/b{{7,}}.tar".replace("{7,}", "7"), "1::2.5")
    assert urls == tuple(f"{tmp_path}/{name}.tar" for name in ("a0", "a1", "b7"))
    assert weights == (1.0, 1.0, 2.5)
    assert expand_shards("pipe:cat {a,b}.tar") == (("pipe:cat a.tar", "pipe:cat b.tar"), None)
    assert expand_shards(r"pipe:grep -v \d x")[0] == (r"pipe:grep -v \d x",)


@pytest.mark.parametrize(
    ("text", "weights", "says"),
    [
        ("{here}/{{0..2}}.tar", None, r"2 of 3 shards do not exist: .*/1\.tar, .*/2\.tar"),
        ("{here}", None, "is a folder"),
        ("", None, "empty"),
        ("{here}/0.tar::", None, "empty"),
        ("nfs4://x/0.tar", None, "nfs4: cannot be opened"),
        ("{here}/0.tar", "1::2", r"1::2: expected a finite number >= 0 for each part of --train-data \(1\)"),
        ("{here}/0.tar", "x", "x: expected a finite number"),
        ("{here}/0.tar", "-1", "-1: expected a finite number"),
        ("{here}/0.tar", "0", "at least one of them > 0"),
        ("{here}/0.tar", "nan", "nan: expected a finite number"),
    ],
)
def test_what_cannot_be_read_is_said_beforehand(tmp_path: Path, text: str, weights: str | None, says: str) -> None:
    """Oracle: one line that names the flaw."""
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match=says) as error:
        expand_shards(text.format(here=tmp_path), weights)
    assert "\n" not in str(error.value)


def test_counts_are_those_written_down(tmp_path: Path) -> None:
    """Oracle: the numbers in the files; None as soon as one folder or shard has none."""
    first, second = good_tars(tmp_path / "a", [1, 1]), good_tars(tmp_path / "b", [1])
    assert WebDatasetSource(first).count() is None
    (tmp_path / "a" / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 4, "other.tar": 50}))
    assert WebDatasetSource(first).count() == 7
    assert WebDatasetSource(first[:1]).count() == 3
    assert WebDatasetSource(first + second).count() is None
    (tmp_path / "b" / "__len__").write_text("11\n")
    assert WebDatasetSource(first + second).count() == 18
    (tmp_path / "b" / "__len__").write_text("eleven")
    with pytest.raises(UserError, match="__len__: not a number"):
        WebDatasetSource(second).count()
    with pytest.raises(UserError, match="1 training shards for 2 data workers"):
        WebDatasetSource(second).check_consumers(2)
    WebDatasetSource(second, resampled=True).check_consumers(2)


def test_consumers_share_a_pass_and_orders_differ(tmp_path: Path) -> None:
    """Oracle: all keys once over consumers; another order for another seed, epoch, pass, and the same for the same."""
    source = WebDatasetSource(good_tars(tmp_path, [3, 4, 5, 6]))
    for consumers in (1, 2, 3, 4):
        got = [key for consumer in range(consumers) for key in keys(source, consumer=consumer, consumers=consumers)]
        assert sorted(got) == [f"{n:05d}" for n in range(18)]
    orders = [keys(source, **change) for change in ({}, {"seed": 1}, {"epoch": 1}, {"pass_index": 1}, {})]
    assert orders[0] == orders[-1]
    assert len({tuple(order) for order in orders}) == 4


def test_resampled_shards_follow_their_weights(tmp_path: Path) -> None:
    """Oracle: a binomial bound of five standard deviations; weight 0 never comes."""
    source = WebDatasetSource(good_tars(tmp_path, [1, 1, 1]), weights=(3.0, 1.0, 0.0), resampled=True)
    counts = Counter(key for pass_index in range(200) for key in keys(source, pass_index=pass_index))
    assert counts.total() == 600
    assert set(counts) == {"00000", "00001"}
    assert abs(counts["00000"] - 450) < 5 * (600 * 0.75 * 0.25) ** 0.5
    others = [keys(source, consumer=consumer, consumers=2, pass_index=3) for consumer in range(2)]
    assert [len(one) for one in others] == [1, 1]


def test_pipes_and_compressed_tars_are_the_tar(tmp_path: Path) -> None:
    """Oracle: the tar itself. A command that fails costs one count."""
    (path,) = good_tars(tmp_path, [5])
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    expected = list(WebDatasetSource((path,)).in_order())
    for url in (f"pipe:cat {path}", f"pipe:gzip -dc {packed}", str(packed), f"file:{path}"):
        got = list(WebDatasetSource((url,)).in_order())
        assert [{**raw, "__url__": path} for raw in got] == expected, url
    skips = SkipCounter()
    assert [raw["__key__"] for raw in WebDatasetSource(("pipe:exit 3", path)).in_order(skips)] == [
        raw["__key__"] for raw in expected
    ]
    assert skips.take() == {BROKEN_SHARD: 1}


def test_a_name_twice_is_a_broken_shard(tmp_path: Path) -> None:
    """Oracle: one count, and the samples beside it."""
    path = write_tar(tmp_path / "0.tar", [sample(0), [*sample(1), *sample(1)], sample(2)])
    skips = SkipCounter()
    got = [raw["__key__"] for raw in WebDatasetSource((str(path),)).in_order(skips)]
    assert got == ["00000", "00001", "00002"]
    assert skips.take() == {BROKEN_SHARD: 1}


@pytest.mark.parametrize("how", ["{}", "pipe:cat {}; sleep 2; touch {}.done"])
def test_an_abandoned_iterator_closes_its_shard_at_once(tmp_path: Path, how: str) -> None:
    """Oracle: this process's open files, and Python's own warning of files left to the garbage collector.

    What a pipe's command has still to do is not waited for.
    """
    (path,) = good_tars(tmp_path, [30])
    before = opened()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in ("in_order", "train_samples"):
            source = WebDatasetSource((how.format(path, path),))
            samples = source.in_order() if start == "in_order" else source.train_samples(share(), SkipCounter())
            next(samples)
            assert opened() - before
            del samples
            gc.collect()
            assert not opened() - before
    assert not Path(f"{path}.done").exists()


def opened() -> set[str]:
    """Tars and pipes that this process has open; a pipe has a number in its name."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    return {name for name in names if name.startswith("pipe:") or name.endswith(".tar")}

"""Caption sets beside tars: read with the tar's samples, checked against them, written whole."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from square_shards import write_square_shards

from open_clip_ov2.data.captions import all_captions, choose_caption, group_text, parse_caption_keys
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sidecars import (
    CaptionSet,
    begin_set,
    caption_sets,
    missing_sidecars,
    read_sidecar,
    sidecar_path,
    sidecars_in,
    write_sidecar,
)
from open_clip_ov2.data.skips import SkipCounter, SkipSample
from open_clip_ov2.data.storage import matching
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

KEYS = parse_caption_keys("recap:caption=0.5,txt=0.5")


def make_set(folder: Path, tars: list[Path], **more: Any) -> CaptionSet:
    """Captions "KEY in words" of every sample."""
    begin_set(folder, {"made_by": "a test", **more})
    for tar in tars:
        samples = read_tar(str(tar), pytest.fail)
        write_sidecar(
            sidecar_path(folder, str(tar)),
            ({"key": one["__key__"], "caption": f"{one['__key__']} in words"} for one in samples),
        )
    return CaptionSet("recap", str(folder))


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    return write_square_shards(tmp_path / "in", 2, 4)


def test_a_sample_gets_its_line_and_captions_read_it(tars: list[Path], tmp_path: Path) -> None:
    """Oracle: the tars alone, whose entries, keys and order stay; weights by 400 draws (binomial, 6 sigma)."""
    recap = make_set(tmp_path / "captions", tars)
    urls = tuple(map(str, tars))
    plain = list(WebDatasetSource(urls).in_order())
    for template in (recap, CaptionSet("recap", f"pipe:cat {tmp_path}/captions/{{shard}}.jsonl.gz")):
        joined = list(WebDatasetSource(urls, captions=(template,)).in_order())
        assert [{name: value for name, value in one.items() if name != "recap"} for one in joined] == plain
        for sample in joined:
            assert all_captions(sample, KEYS) == [f"{sample['__key__']} in words", sample["txt"].decode()]
            assert all_captions(sample, parse_caption_keys("recap")) == [f"{sample['__key__']} in words"]
    drawn = Counter(choose_caption(joined[0], KEYS, random.Random(seed)) for seed in range(400))
    assert 140 < drawn[f"{joined[0]['__key__']} in words"] < 260


def test_a_sample_that_was_dropped_is_skipped_by_its_rule_and_keeps_its_other_captions(
    tars: list[Path], tmp_path: Path
) -> None:
    recap = make_set(tmp_path / "captions", tars[:1])
    keys = [line["key"] for line in read_sidecar(sidecar_path(tmp_path / "captions", str(tars[0])))]
    lines = [
        {"key": keys[0], "dropped": "min-words", "caption": "red"}, {"key": keys[1], "error": "not found"},
        {"key": keys[2], "caption": ["", " two "]}, {"key": keys[3], "caption": ""},
    ]  # fmt: skip
    write_sidecar(sidecar_path(tmp_path / "captions", str(tars[0])), lines)
    samples = list(WebDatasetSource((str(tars[0]),), captions=(recap,)).in_order())
    causes = []
    for sample in samples:
        try:
            causes.append(all_captions(sample, parse_caption_keys("recap:caption")))
        except SkipSample as error:
            causes.append(str(error))
    assert causes == ["dropped: min-words", "no caption in the set: not found", ["two"], "empty caption: recap:caption"]
    assert [len(all_captions(sample, KEYS)) for sample in samples] == [1, 1, 2, 1]
    assert group_text(samples[0], parse_caption_keys("recap:dropped")[0]) == "min-words"


def test_sidecars_that_do_not_belong_to_the_tars_end_in_one_line(tars: list[Path], tmp_path: Path) -> None:
    """Oracle: what is wrong, where, and what to do, in the message."""
    folder, urls = tmp_path / "captions", tuple(map(str, tars))
    recap = make_set(folder, tars[:1])
    first = sidecar_path(folder, urls[0])
    lines = list(read_sidecar(first))

    def message(found: CaptionSet = recap, of: tuple[str, ...] = urls[:1]) -> str:
        with pytest.raises(UserError) as raised:
            list(WebDatasetSource(of, captions=(found,)).in_order())
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "1 of 2 tars have no sidecar, the first is " + str(folder / "00001.jsonl.gz") in message(of=urls)
    assert "do not exist" in message(CaptionSet("recap", f"{folder}/{{shard}}.gz"))
    assert "cannot be read (" in message(CaptionSet("recap", f"pipe:cat {folder}/{{shard}}.gz"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/sidecars/00000.jsonl.gz", first.read_bytes())
    stored = CaptionSet("recap", "memory://sidecars/{shard}.jsonl.gz")
    assert "memory://sidecars/00001.jsonl.gz: one of the sidecars of --captions recap" in message(stored, urls)
    assert "no such folder" in message(CaptionSet("recap", str(tmp_path / "nowhere")))
    assert "has no settings.json" in message(CaptionSet("recap", str(tmp_path / "in")))
    assert "an entry of this name" in message(CaptionSet("txt", str(folder)))
    write_sidecar(first, lines[:3])
    assert "ends after 3 lines, and" in message()
    write_sidecar(first, [*lines[:2], {"key": "x/y", "caption": ""}])
    assert f"line 3 is for 'x/y', where {urls[0]} has '{lines[2]['key']}'" in message()
    for text, problem in (("[1]", "not an object with a key"), ("{", "not JSON")):
        first.write_bytes(gzip.compress(text.encode()))
        assert problem in message()
    for text in ("recap", "=x", "Recap=x", "png=x", "recap="):
        with pytest.raises(UserError, match="recap=captions/"):
            caption_sets(text)
    assert caption_sets(["a=1", "b=2", "a=3"]) == caption_sets({"a": "3", "b": "2"})


def test_a_sidecar_that_breaks_off_costs_the_rest_of_its_tar(tars: list[Path], tmp_path: Path) -> None:
    recap = make_set(tmp_path / "captions", tars)
    commands = CaptionSet("recap", f"pipe:test {{shard}} = 00000 && cat {tmp_path}/whole/{{shard}}.jsonl.gz")
    make_set(tmp_path / "whole", tars)
    first = sidecar_path(tmp_path / "captions", str(tars[0]))
    first.write_bytes(first.read_bytes()[:-12])
    for found, broken, usable in ((recap, tars[0], range(4, 8)), (commands, tars[1], (4,))):
        skips = SkipCounter(log=False)
        samples = list(WebDatasetSource(tuple(map(str, tars)), captions=(found,)).in_order(skips))
        assert skips.total == {"broken shard": 1}
        assert len(samples) in usable
        assert str(broken) in skips.example


def test_a_set_is_begun_once_and_written_the_same_each_time(tars: list[Path], tmp_path: Path) -> None:
    """Oracle: the bytes. Other settings are refused by name."""
    folder, urls = tmp_path / "captions", list(map(str, tars))
    recap = make_set(folder, tars[:1], model="a")
    before, identity = sidecar_path(folder, urls[0]).read_bytes(), recap.identity()
    assert missing_sidecars(folder, urls) == {"00001": urls[1]}
    make_set(folder, tars, model="a")
    assert (missing_sidecars(folder, urls), sidecar_path(folder, urls[0]).read_bytes()) == ({}, before)
    assert [path.name for path in sidecars_in(folder)] == ["00000.jsonl.gz", "00001.jsonl.gz"]
    with pytest.raises(UserError, match="begun with model a, not b"):
        make_set(folder, tars, model="b")
    assert recap.identity() == identity != make_set(tmp_path / "other", tars, model="b").identity()
    with pytest.raises(UserError, match=r"holds other files \(00000.tar, 00001.tar\)"):
        make_set(tmp_path / "in", tars)
    assert json.loads((folder / "settings.json").read_text()) == {"made_by": "a test", "model": "a"}


def test_the_name_of_a_set_in_any_case_is_the_set(tars: list[Path], tmp_path: Path) -> None:
    """Oracle: the same key in lower case, which skips what was dropped."""
    recap = make_set(tmp_path / "captions", tars[:1])
    keys = [line["key"] for line in read_sidecar(sidecar_path(tmp_path / "captions", str(tars[0])))]
    lines = [{"key": key, "dropped": "min-words", "caption": "red"} for key in keys]
    write_sidecar(sidecar_path(tmp_path / "captions", str(tars[0])), lines)
    for sample in WebDatasetSource((str(tars[0]),), captions=(recap,)).in_order():
        for key in ("recap", "Recap"):
            with pytest.raises(SkipSample, match="dropped: min-words"):
                all_captions(sample, parse_caption_keys(key))


def test_a_set_by_a_file_address(tars: list[Path], tmp_path: Path) -> None:
    """Oracle: the same set by its path."""
    make_set(tmp_path / "captions", tars)
    urls = tuple(map(str, tars))
    by_path, by_address = (
        list(WebDatasetSource(urls, captions=(CaptionSet("recap", folder),)).in_order())
        for folder in (f"{tmp_path}/captions", f"file://{tmp_path}/captions")
    )
    assert by_address == by_path
    assert matching(f"file://{tmp_path}/in/*.tar") == sorted(urls)
    (tmp_path / "in" / "sizes.json").write_text(json.dumps(dict.fromkeys((tar.name for tar in tars), 4)))
    assert WebDatasetSource(tuple(f"file://{url}" for url in urls)).count() == 8

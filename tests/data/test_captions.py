"""Caption keys: parsing, drawing, and what counts as which problem."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from open_clip_ov2.data.captions import CaptionKey, all_captions, choose_caption, group_text, parse_caption_keys
from open_clip_ov2.data.skips import BAD_JSON, BAD_UTF8, EMPTY_CAPTION, MISSING_CAPTION, SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.pictures import pictures


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("txt", [("txt", (), 1.0)]),
        ("json:recaption=0.8,txt=0.2", [("json", ("recaption",), 0.8), ("txt", (), 0.2)]),
        (" caption.txt = 2 , json:a.0.b ", [("caption.txt", (), 2.0), ("json", ("a", "0", "b"), 1.0)]),
        ("json:a,json:b=1e-3", [("json", ("a",), 1.0), ("json", ("b",), 0.001)]),
    ],
)
def test_grammar(text: str, keys: list[tuple[str, tuple[str, ...], float]]) -> None:
    """Oracle: ENTRY[:dotted.path][=weight], read by hand."""
    assert parse_caption_keys(text) == tuple(CaptionKey(*key) for key in keys)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        *[("", "''"), (",txt", "''"), ("txt,", "''"), ("=1", "'=1'"), (":a", "':a'"), ("json:", "'json:'")],
        *[("json:a..b", "'json:a..b'"), ("json:a:b", "'json:a:b'"), ("txt=", "'txt='"), ("txt=x", "'txt=x'")],
        *[("txt=0", "'txt=0'"), ("txt=-1", "'txt=-1'"), ("txt=nan", "'txt=nan'"), ("txt=inf", "'txt=inf'")],
        *[("txt=1=2", "'txt=1=2'"), ("txt,json:a,txt=2", "'txt'")],
    ],
)
def test_malformed_keys_say_flag_part_and_example(text: str, part: str) -> None:
    """Oracle: the three things that a message must hold."""
    with pytest.raises(UserError) as error:
        pictures([], text)
    message = str(error.value)
    assert "\n" not in message
    assert "--caption-keys" in message
    assert part in message
    assert "json:recaption=0.8,txt=0.2" in message


def drawn(sample: dict[str, Any], keys: str, draws: int = 4000) -> Counter[str]:
    rng = random.Random(0)
    return Counter(choose_caption(sample, parse_caption_keys(keys), rng) for _ in range(draws))


def near(count: int, share: float, draws: int = 4000) -> bool:
    """Within five standard deviations of a binomial."""
    return abs(count - share * draws) < 5 * (draws * share * (1 - share)) ** 0.5


def test_frequencies_follow_the_weights_and_lists_are_uniform() -> None:
    """Oracle: binomial bounds. A list counts as one key, however long."""
    sample = {"txt": b" t \n", "json": json.dumps({"r": ["a", "b", "  ", "c"]}).encode()}
    counts = drawn(sample, "json:r=0.6,txt=0.2,caption.txt=5")
    assert set(counts) == {"a", "b", "c", "t"}
    assert near(counts["t"], 0.25)  # 0.2 of 0.8: the absent key's weight is left out
    assert all(near(counts[name], 0.25) for name in "abc")


def test_an_empty_or_unreadable_key_leaves_the_others() -> None:
    """Oracle: the one usable text."""
    for other in (b"   ", b"\xff", b"{", b'{"r": 3}', b'{"r": []}', b'{"q": "x"}'):
        sample = {"txt": b"usable", "json": other}
        assert set(drawn(sample, "json:r=9,txt=1", 20)) == {"usable"}
        assert all_captions(sample, parse_caption_keys("json:r=9,txt=1")) == ["usable"]


@pytest.mark.parametrize(
    ("sample", "cause"),
    [
        ({}, MISSING_CAPTION),
        ({"caption.txt": b"x"}, MISSING_CAPTION),
        ({"json": b'{"a": 1}'}, MISSING_CAPTION),
        ({"txt": b""}, EMPTY_CAPTION),
        ({"txt": b" \n\t"}, EMPTY_CAPTION),
        ({"json": b'{"r": null}'}, EMPTY_CAPTION),
        ({"json": b'{"r": ["", " "]}', "txt": b" "}, EMPTY_CAPTION),
        ({"txt": b"caf\xe9"}, BAD_UTF8),
        ({"txt": b"caf\xe9", "json": b'{"r": ""}'}, BAD_UTF8),
        ({"json": b"{nonsense"}, BAD_JSON),
        ({"json": b'{"r": 7}'}, BAD_JSON),
        ({"json": b'{"r": ["a", 7]}'}, BAD_JSON),
        ({"json": b'{"r": {"x": "y"}}'}, BAD_JSON),
        ({"json": b'{"r": "\\ud800"}'}, BAD_JSON),
        ({"json": b"[" * 100_000}, BAD_JSON),
    ],
)
def test_causes(sample: dict[str, Any], cause: str) -> None:
    """Oracle: the causes as the manual names them."""
    keys = parse_caption_keys("json:r,txt")
    with pytest.raises(SkipSample) as error:
        choose_caption(sample, keys, random.Random(0))
    assert error.value.cause == cause
    with pytest.raises(SkipSample):
        all_captions(sample, keys)


def test_paths_lists_and_json_without_a_path() -> None:
    """Oracle: the document, by hand. A `json` entry without a path is a string or a list, never raw braces."""
    sample = {"json": b'{"a": [{"b": "first"}, {"b": ["second", "third"]}]}', "alt.json": b'["x", "y"]'}
    assert all_captions(sample, parse_caption_keys("json:a.1.b,json:a.0.b")) == ["second", "third", "first"]
    assert all_captions(sample, parse_caption_keys("ALT.json")) == ["x", "y"]
    with pytest.raises(SkipSample, match=BAD_JSON):
        all_captions(sample, parse_caption_keys("json"))


def test_the_mark_that_windows_writes_is_no_part_of_a_caption() -> None:
    """In text, in JSON, in groups. Oracle: the same bytes without U+FEFF."""
    sample = {"txt": "\ufeffa cat".encode(), "json": '\ufeff{"a": "a dog"}'.encode()}
    assert all_captions(sample, parse_caption_keys("txt,json:a")) == ["a cat", "a dog"]
    assert group_text(sample, parse_caption_keys("txt")[0]) == "a cat"


def test_group_text() -> None:
    """Oracle: the values as text; "" where there is none."""
    sample = {"json": b'{"kind": "cat", "label": 3, "none": null}', "txt": b" t "}
    values = {"json:kind": "cat", "json:label": "3", "json:none": "", "json:nope": "", "txt": "t", "cls": ""}
    assert {name: group_text(sample, parse_caption_keys(name)[0]) for name in values} == values
    assert group_text(sample, None) == ""

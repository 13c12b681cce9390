"""Where captions are in a sample, and which of them is used."""

from __future__ import annotations

import contextlib
import json
import math
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.data.skips import (
    BAD_JSON,
    BAD_UTF8,
    DROPPED,
    EMPTY_CAPTION,
    MISSING_CAPTION,
    NO_CAPTION,
    SkipSample,
    missing,
)
from open_clip_ov2.errors import UserError

EXAMPLE = "for example 'json:recaption=0.8,txt=0.2'"
PROMPT_END = "\x1e"  # between prompt and caption of one text: ASCII's record separator, which no cleaned prompt has
PROMPT_TEMPLATE = "{text} :"  # what a captioner of ours is given of a text, in training and when it writes
NO_PROMPT = "none"  # the key whose weight is the share of samples without a prompt
MOST_PROMPT_CHARACTERS = 1000  # ours: alt-texts can be whole pages


class Line(bytes):
    """A sample's line of a caption set (sidecars.py), as an entry of the sample that is called after the set."""


@dataclass(frozen=True)
class CaptionKey:
    """An entry of the sample (`txt`, `json`, a csv column), a path inside its JSON, and a sampling weight.

    A step of the path names a field of an object, or counts from 0 into a list.
    """

    entry: str
    path: tuple[str, ...] = ()
    weight: float = 1.0

    def __str__(self) -> str:
        return ":".join((self.entry, ".".join(self.path))) if self.path else self.entry


def parse_caption_keys(text: str) -> tuple[CaptionKey, ...]:
    """`ENTRY[:dotted.path][=weight]`, comma separated. Raises UserError."""
    keys = tuple(_parse_one(part.strip()) for part in text.split(","))
    names = [str(key) for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name!r} is named twice in {text!r}; once each, {EXAMPLE}")
    return keys


def _parse_one(part: str) -> CaptionKey:
    name, equals, weight_text = part.partition("=")
    entry, colon, path = name.strip().partition(":")
    entry, steps = entry.strip(), tuple(step.strip() for step in path.split(".")) if colon else ()
    if not entry or any(not step or ":" in step for step in steps):
        raise UserError(f"{part!r} is not ENTRY[:dotted.path][=weight], {EXAMPLE}")
    try:
        weight = float(weight_text) if equals else 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError
    except ValueError:
        raise UserError(f"the weight of {part!r}: expected a finite number > 0, {EXAMPLE}") from None
    return CaptionKey(entry, steps, weight)


def choose_caption(sample: Mapping[str, Any], keys: Sequence[CaptionKey], rng: random.Random) -> str:
    """One caption: a key by weight among those that have a caption here, then one of its captions. Raises SkipSample.

    Text that cannot be read (bad UTF-8, bad JSON) counts as a key without captions.
    """
    return _drawn(_read_all(sample, keys), rng)


def _drawn(found: Sequence[tuple[CaptionKey, list[str]]], rng: random.Random) -> str:
    chosen = rng.choices([captions for _, captions in found], weights=[key.weight for key, _ in found])[0]
    return rng.choice(chosen)


def with_prompt(sample: Mapping[str, Any], caption: str, keys: Sequence[CaptionKey], rng: random.Random | None) -> str:
    """Prompt, PROMPT_END and caption. The prompt is drawn by weight among the keys that have one here and NO_PROMPT, or
    without `rng` the first; "" if there is none."""
    found: list[tuple[CaptionKey, list[str]]] = []
    with contextlib.suppress(SkipSample):
        found = _read_all(sample, [key for key in keys if str(key) != NO_PROMPT])
    choices = [*found, *((key, [""]) for key in keys if str(key) == NO_PROMPT)] or [(CaptionKey(NO_PROMPT), [""])]
    prompt = choices[0][1][0] if rng is None else _drawn(choices, rng)
    prompt = cleaned(prompt)
    return (PROMPT_TEMPLATE.replace("{text}", prompt) if prompt else "") + PROMPT_END + caption


def cleaned(text: str, special: Sequence[str] = ()) -> str:
    """One line of printable text without the `special` strings of a tokenizer, of MOST_PROMPT_CHARACTERS at most.

    Control characters, unassigned and private ones and halves of surrogate pairs become spaces, and so do the special
    strings, again until none is left: what is cut out of `<im<image>age>` must leave no other one.
    """
    text = "".join(
        " " if unicodedata.category(letter)[0] in "CZ" else letter for letter in text[: 4 * MOST_PROMPT_CHARACTERS]
    )
    while any(one in text for one in special):
        for one in special:
            text = text.replace(one, " ")
        text = " ".join(text.split())
    return " ".join(text.split())[:MOST_PROMPT_CHARACTERS].strip()


def all_captions(sample: Mapping[str, Any], keys: Sequence[CaptionKey]) -> list[str]:
    """Every caption of a sample, in the order of the keys. Raises SkipSample if there is none."""
    return [caption for _, captions in _read_all(sample, keys) for caption in captions]


def group_text(sample: Mapping[str, Any], key: CaptionKey | None) -> str:
    """The value under `key` as text, numbers too; "" where there is none, or nothing that can be read."""
    if key is None:
        return ""
    try:
        node = _find(sample, key, {})
    except SkipSample:
        return ""
    if isinstance(node, list):
        node = next(iter(node), None)
    return str(node).strip() if isinstance(node, (str, int, float)) else ""


def _read_all(sample: Mapping[str, Any], keys: Sequence[CaptionKey]) -> list[tuple[CaptionKey, list[str]]]:
    """The keys that have captions here, with them.

    Raises SkipSample if there are none, with the gravest cause: what cannot be read, then what is empty, then what is
    missing.
    """
    found: list[tuple[CaptionKey, list[str]]] = []
    problem: SkipSample | None = None
    parsed: dict[str, Any] = {}
    for key in keys:
        try:
            captions = _read(sample, key, parsed)
        except SkipSample as error:
            problem = error
            continue
        if captions:
            found.append((key, captions))
        elif captions is not None and problem is None:
            problem = SkipSample(EMPTY_CAPTION, str(key))
    if not found:
        raise problem or missing(MISSING_CAPTION, sample, [key.entry.lower() for key in keys], map(str, keys))
    return found


def _read(sample: Mapping[str, Any], key: CaptionKey, parsed: dict[str, Any]) -> list[str] | None:
    """Non-empty captions under a key, stripped; None if the sample has no such entry or path."""
    node = _find(sample, key, parsed)
    entry = _entry(sample, key)
    line = parsed[entry] if isinstance(sample.get(entry), Line) else {}
    if "dropped" in line:
        raise SkipSample(f"{DROPPED}: {line['dropped']}")
    if "error" in line:
        raise SkipSample(NO_CAPTION, str(line["error"]))
    if node is _ABSENT:
        return None
    captions = node if isinstance(node, list) else [] if node is None else [node]
    if not all(isinstance(caption, str) for caption in captions):
        raise SkipSample(BAD_JSON, f"{key}: neither a string nor a list of strings")
    stripped = [caption.strip() for caption in captions if caption.strip()]
    try:
        for caption in stripped:
            caption.encode("utf-8")  # JSON may spell half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise SkipSample(BAD_JSON, f"{key}: {error}") from None
    return stripped


_ABSENT = object()


def _entry(sample: Mapping[str, Any], key: CaptionKey) -> str:
    """webdataset gives suffixes in lower case; csv columns are as they are written."""
    return key.entry if key.entry in sample else key.entry.lower()


def _find(sample: Mapping[str, Any], key: CaptionKey, parsed: dict[str, Any]) -> Any:
    """What stands under a key: its text, or the node of its JSON; _ABSENT if there is none. Raises SkipSample.

    `parsed`: this sample's JSON by entry, so that several keys into one are one parse.
    An entry that ends in `json` is JSON with or without a path, so that no caption is ever braces and quotes. The name
    of a caption set stands for its `caption`.
    """
    entry = _entry(sample, key)
    if entry not in sample:
        return _ABSENT
    value = sample[entry]
    path = key.path or (("caption",) if isinstance(value, Line) else ())
    is_json = bool(path) or f".{entry}".endswith(".json")
    if is_json and entry in parsed:
        return _follow(parsed[entry], path)
    try:
        text = value.decode("utf-8-sig") if isinstance(value, bytes) else value  # -sig: Windows writes a mark
        if not is_json:
            return text
        parsed[entry] = json.loads(text)
    except UnicodeDecodeError as error:
        raise SkipSample(BAD_UTF8, f"{key}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SkipSample(BAD_JSON, f"{key}: {error}") from None
    return _follow(parsed[entry], path)


def _follow(node: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return _ABSENT
    return node

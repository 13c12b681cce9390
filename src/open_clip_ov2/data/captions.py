"""Where captions are in a sample, and which of them is used."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.data.skips import BAD_JSON, BAD_UTF8, EMPTY_CAPTION, MISSING_CAPTION, SkipSample
from open_clip_ov2.errors import UserError

EXAMPLE = "for example --caption-keys 'json:recaption=0.8,txt=0.2'"


@dataclass(frozen=True)
class CaptionKey:
    """An entry of the sample (`txt`, `json`, a csv column), a path inside its JSON, and a sampling weight."""

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
            raise UserError(f"--caption-keys: {name!r} is named twice in {text!r}")
    return keys


def _parse_one(part: str) -> CaptionKey:
    name, equals, weight_text = part.partition("=")
    entry, colon, path = name.strip().partition(":")
    steps = tuple(path.split(".")) if colon else ()
    if not entry or any(not step for step in steps):
        raise UserError(f"--caption-keys: {part!r} is not ENTRY[:dotted.path][=weight], {EXAMPLE}")
    try:
        weight = float(weight_text) if equals else 1.0
    except ValueError:
        raise UserError(f"--caption-keys: the weight of {part!r} is not a number, {EXAMPLE}") from None
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"--caption-keys: the weight of {part!r} must be a finite number above 0, {EXAMPLE}")
    return CaptionKey(entry, steps, weight)


def choose_caption(sample: Mapping[str, Any], keys: Sequence[CaptionKey], rng: random.Random) -> str:
    """One caption: a key by weight among those that have a caption here, then one of its captions.

    Raises SkipSample. Text that cannot be read (bad UTF-8, bad JSON) counts as a key without captions, and as the
    cause if no other key has one.
    """
    found, problem = _read_all(sample, keys)
    if not found:
        raise problem
    chosen = rng.choices([captions for _, captions in found], weights=[key.weight for key, _ in found])[0]
    return rng.choice(chosen)


def all_captions(sample: Mapping[str, Any], keys: Sequence[CaptionKey]) -> list[str]:
    """Every caption of a sample, in the order of the keys. Raises SkipSample if there is none."""
    found, problem = _read_all(sample, keys)
    if not found:
        raise problem
    return [caption for _, captions in found for caption in captions]


def _read_all(
    sample: Mapping[str, Any], keys: Sequence[CaptionKey]
) -> tuple[list[tuple[CaptionKey, list[str]]], SkipSample]:
    found: list[tuple[CaptionKey, list[str]]] = []
    problem = SkipSample(MISSING_CAPTION, f"none of {', '.join(map(str, keys))}")
    for key in keys:
        if key.entry not in sample:
            continue
        try:
            captions = _read(sample[key.entry], key)
        except SkipSample as error:
            problem = error
            continue
        if captions:
            found.append((key, captions))
        elif problem.cause == MISSING_CAPTION and captions is not None:
            problem = SkipSample(EMPTY_CAPTION, str(key))
    return found, problem


def _read(value: bytes | str, key: CaptionKey) -> list[str] | None:
    """Non-empty captions under a key; None if its JSON has no such path."""
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise SkipSample(BAD_UTF8, f"{key}: {error}") from None
    if not key.path:
        return [text.strip()] if text.strip() else []
    try:
        node = json.loads(text)
    except ValueError as error:
        raise SkipSample(BAD_JSON, f"{key}: {error}") from None
    for step in key.path:
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            return None
    if node is None:
        return []
    captions = node if isinstance(node, list) else [node]
    if not all(isinstance(caption, str) for caption in captions):
        raise SkipSample(BAD_JSON, f"{key}: neither a string nor a list of strings")
    return [caption.strip() for caption in captions if caption.strip()]

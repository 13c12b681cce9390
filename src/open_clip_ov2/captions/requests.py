"""What an engine is asked for: a picture, a prompt, and how its caption's tokens are chosen.

All of it follows from the settings, the seed and the sample, so that the caption of a sample depends neither on its
batch nor on when and by which process it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from open_clip_ov2.core.generate import RowSampling
from open_clip_ov2.data.captions import CaptionKey, cleaned, group_text
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.tables import from_table, key, pairs, real, whole

TEXT = "{text}"
GREEDY = "greedy"


class Request(NamedTuple):
    """One caption to be written. `image` is in RGB."""

    key: str
    image: Image.Image
    prompt: str
    sampling: RowSampling


@dataclass(frozen=True)
class Sampler:
    """One way to choose tokens: `top_k` = 1 is greedy. `weight`: how often it is drawn beside others."""

    top_k: int = key(whole(1), default=1)
    temperature: float = key(real(0, above=True), default=1.0)
    weight: float = key(real(0, above=True), default=1.0)


def read_sampler(text: str) -> Sampler:
    """From `greedy`, `greedy,weight=2` or `top-k=20,temperature=0.7,weight=1`. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    greedy = GREEDY in parts
    items = pairs("sampling", ",".join(part for part in parts if part != GREEDY))
    if greedy and any(name != "weight" for name, _ in items):
        raise UserError(f"{text!r}: greedy takes the likeliest token, so it has no top-k and no temperature")
    if not greedy and not any(name.strip() == "top-k" for name, _ in items):
        raise UserError(f"{text!r}: expected greedy, or top-k=K,temperature=T")
    return from_table(Sampler, f"{text!r}", items)


@dataclass(frozen=True)
class Prompts:
    """`condition` names the text that is given, `template` says how, `without` is the prompt where there is none."""

    condition: CaptionKey | None
    template: str
    without: str

    def __post_init__(self) -> None:
        if self.condition is not None and TEXT not in self.template:
            raise UserError(f"--prompt {self.template!r}: {TEXT} is missing, where the text of --condition goes")

    def of(self, sample: Mapping[str, Any], special: Sequence[str]) -> str:
        """The prompt of a raw sample, its text cleaned of `special` strings."""
        text = cleaned(group_text(sample, self.condition), special)
        return self.template.replace(TEXT, text) if text else self.without


def row_sampling(samplers: Sequence[Sampler], seed: int, key: str) -> RowSampling:
    """The sampler of one sample, drawn by weight, and its noise: a function of seed and key alone."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(one.weight for one in samplers)
    chosen = samplers[-1]
    for one in samplers:
        if point < one.weight:
            chosen = one
            break
        point -= one.weight
    return RowSampling(chosen.top_k, chosen.temperature, int.from_bytes(digest[8:], "big") >> 1)


def read_condition(value: Any) -> CaptionKey:
    """One place of text: `txt`, `json:title`, `json:alts.0`. Raises UserError."""
    from open_clip_ov2.data.captions import parse_caption_keys

    with naming("--condition"):
        keys = parse_caption_keys(value)
        if len(keys) > 1:
            raise UserError(f"{value!r} names {len(keys)} places; expected one")
    return keys[0]

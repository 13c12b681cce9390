"""What the models that write captions are asked for, behind one interface: a picture, a prompt, and how the caption's
tokens are chosen.

A request follows from the settings, the seed and the sample, so that the caption of a sample depends neither on its
batch nor on when and by which process it is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image

from open_clip_ov2.core.generate import RowSampling
from open_clip_ov2.data.captions import CaptionKey, cleaned, group_text
from open_clip_ov2.errors import UserError
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
    names = {name.strip() for name, _ in items}
    if names - {"weight"} if greedy else "top-k" not in names:
        raise UserError(f"{text!r}: expected top-k=K,temperature=T, or greedy, which has neither")
    return from_table(Sampler, f"{text!r}", items)


@dataclass(frozen=True)
class Prompts:
    """`condition` names the texts that are given. `template` has `{PLACE}` where the text of a place goes, and `{text}`
    for all of them; `without` is the prompt of a sample that has none."""

    condition: tuple[CaptionKey, ...]
    template: str
    without: str

    def __post_init__(self) -> None:
        places = [f"{{{key}}}" for key in self.condition]
        if TEXT not in self.template and not all(place in self.template for place in places):
            raise UserError(
                f"--prompt {self.template!r}: {TEXT} is missing, where the text of --condition goes, or each place in "
                f"it ({', '.join(places)})"
            )

    def of(self, sample: Mapping[str, Any], special: Sequence[str]) -> str:
        """The prompt of a raw sample, its texts cleaned of `special` strings."""
        texts = {f"{{{key}}}": cleaned(group_text(sample, key), special) for key in self.condition}
        texts[TEXT] = " ".join(filter(None, texts.values()))
        if not texts[TEXT]:
            return self.without
        return re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], self.template)


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


class Engine(Protocol):
    """A model that is open. Equal requests in equal batches give equal captions."""

    @property
    def model(self) -> str:
        """What the settings of a set call it: where its weights are."""

    @property
    def special(self) -> Sequence[str]:
        """Strings that its tokenizer takes for something else than text."""

    def captions(self, requests: Sequence[Request]) -> list[str]:
        """One for each request. May raise anything for a request that it cannot take."""

"""The flags of `ov2 captions filter`, and the rules that they make."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.argv import flag, switch_flag
from open_clip_ov2.captions.repetition import is_refusal, repetition
from open_clip_ov2.captions.write import Task, read_task
from open_clip_ov2.errors import UserError, from_extra
from open_clip_ov2.tables import comma_separated, one_of, real, text, whole

LIKELIHOOD = "likelihood"
EXACT, NEAR = "exact", "near"
_SCORE = re.compile(
    r"(?P<name>[\w-]+)(?::(?P<model>.+?))?(?P<sign>[<>])(?P<limit>\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
)


class ScoreRule(NamedTuple):
    """Keep captions whose score `name` is above (`sign` ">") or below `limit`. `model`: what computes a likelihood."""

    name: str
    model: str | None
    sign: str
    limit: float

    def keeps(self, value: Any) -> bool:
        """False for a score that is missing."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return value > self.limit if self.sign == ">" else value < self.limit

    def __str__(self) -> str:
        return f"{self.name}{f':{self.model}' if self.model else ''}{self.sign}{self.limit:g}"


def read_score(value: str) -> ScoreRule:
    """`likelihood:logs/RUN>0.3`, or `re_clip_score>0.25` of the lines themselves. Raises UserError."""
    found = _SCORE.fullmatch(value.strip())
    if found is None or (found["name"] == LIKELIHOOD) != (found["model"] is not None):
        raise UserError(
            f"{value!r}: expected in quotes FIELD>NUMBER, of a field of the lines, which takes no model, or "
            f"{LIKELIHOOD}:MODEL>NUMBER, which needs a model, for example 'likelihood:logs/RUN>0.3'"
        )
    return ScoreRule(found["name"], found["model"], found["sign"], float(found["limit"]))


@dataclass(frozen=True)
class FilterOptions:
    """What is kept. A caption is dropped by the first rule that it breaks, in the order of the flags here."""

    min_words: int | None = flag("N", whole(1), "at least N words, parted by spaces")
    max_words: int | None = flag("N", whole(1), "at most N words")
    max_repetition: float | None = flag(
        "R", real(0, 1), "at most so much repetition; 0.2: Gopher's nine limits, others in proportion"
    )
    refusals: bool = switch_flag("drop what a model says in place of a description: I'm sorry, as an AI ...")
    language: tuple[str, ...] | None = flag(
        "LANG,...", comma_separated(text), "keep these languages (en,de) as py3langid tells them"
    )
    duplicates: str | None = flag(
        f"{EXACT}|{NEAR}", one_of(EXACT, NEAR), "keep the first of equal captions, or of those alike (MinHash)"
    )
    uids: Path | None = flag("FILE.npy", Path, "keep the uids of a list of DataComp's, DFN's or MetaCLIP's")
    score: list[ScoreRule] | None = flag(
        "'NAME>X'",
        read_score,
        "keep scores above X; repeatable: a field of the lines, or likelihood:MODEL, what the picture is worth for the "
        "caption in nats per token",
        repeat=True,
    )
    shards: str | None = flag("IN", text, "the tars, if they have moved (default: as the set notes them)")
    device: str | None = flag("NAME", text, "for likelihood (default: cuda if there is a GPU, otherwise cpu)")
    task: Task | None = flag(
        "T/N", read_task, "filter every Nth sidecar from the Tth on (default: as SLURM or torchrun says; else all)"
    )

    def text_rules(self) -> dict[str, Callable[[str], bool]]:
        """By verdict: whether a text breaks the rule."""
        rules: dict[str, Callable[[str], bool]] = {}
        if (least := self.min_words) is not None:
            rules["min-words"] = lambda text: len(text.split()) < least
        if (most := self.max_words) is not None:
            rules["max-words"] = lambda text: len(text.split()) > most
        if (limit := self.max_repetition) is not None:
            rules["repetition"] = lambda text: repetition(text) > limit
        if self.refusals:
            rules["refusal"] = is_refusal
        if self.language:
            kept = self.language
            with from_extra("captions", "--language"):
                import py3langid
            rules["language"] = lambda text: py3langid.classify(text)[0] not in kept
        return rules

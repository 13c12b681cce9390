"""The tables of a comparison's file: variants, what is measured, evaluated, shown and asked. config.py has the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.compare.bench.settings import CaptionLengths
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import sample_count
from open_clip_ov2.tables import (
    Reader,
    each,
    flag_table,
    from_table,
    kebab,
    key,
    one_of,
    real,
    switch,
    table,
    text,
    whole,
)

BATCH = ("batch-size", "accum-freq", "global-batch")
SET_BY_US = ("name", "logs", "model", "seed", "stage", "recipe", "train-data", "val-data", "force-image-size", "epochs")
FORMER_NAMES = {"arm": "variant", "arms": "variants"}
Flags = Mapping[str, Any]
_key = key  # where a field is called `key`


train_flags = flag_table(SET_BY_US, "`ov2 compare`")


def _flags(value: Any) -> Flags:
    return {kebab(name): one for name, one in table(value).items()}


def paragraph(value: Any) -> str:
    return " ".join(text(value).split())


def renamed(value: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(FORMER_NAMES.get(name, name), item) for name, item in value.items()]


def tables_of(kind: type) -> Reader:
    """A list of tables. An error gives the name of its table, or its number."""

    def read(value: Any) -> tuple[Any, ...]:
        items = enumerate(each(table)(value), 1)
        names = ((str(item.get("name") or item.get("key") or f"number {number}"), item) for number, item in items)
        return tuple(from_table(kind, name, renamed(item)) for name, item in names)

    return read


@dataclass(frozen=True)
class VariantStage:
    """`share` of the run's samples."""

    resolution: int = key(whole(1), example="32")
    share: float = key(real(0, 1, above=True), example="0.5")


@dataclass(frozen=True)
class Variant:
    """One way to train. `trained` false: only its speed and memory are measured."""

    name: str = key(text)
    model: str = key(text, example='"ov2-vit-nano-8"')
    flags: Flags = key(train_flags, default=dict)
    stages: tuple[VariantStage, ...] = key(tables_of(VariantStage), default=())
    trained: bool = key(switch, default=True, name="train")
    samples: int | None = key(sample_count(1), default=None)

    def __post_init__(self) -> None:
        if self.stages and not math.isclose(sum(stage.share for stage in self.stages), 1.0):
            raise UserError("stages: the shares must add up to 1")


@dataclass(frozen=True)
class Measure:
    """Before training. `samples`: of each run that is timed."""

    repetitions: int = key(whole(1), default=3)
    samples: int = key(sample_count(1), default=2048)
    lengths: CaptionLengths = key(CaptionLengths.parse, default=CaptionLengths, name="caption-tokens")
    largest_batch: bool = key(switch, default=False)
    memory_limit_gb: float | None = key(real(0, above=True), default=None)


@dataclass(frozen=True)
class Search:
    """`samples`: of each run."""

    lr: tuple[float, ...] = key(each(real(0, above=True)), example="[1e-3, 2e-3]")
    samples: int = key(sample_count(1), example='"4k"')

    def __post_init__(self) -> None:
        if not self.lr or len(set(self.lr)) < len(self.lr):
            raise UserError(f"lr {list(self.lr)}: expected one or more different numbers")


@dataclass(frozen=True)
class Question:
    """Whether variant `a` is better than `b` on a metric, by its key; `text` asks it."""

    a: str = key(text, example='"ov2"')
    b: str = key(text, example='"CLIP"')
    metric: str = key(text, example='"knn.top1"')
    text: str = key(paragraph, example='"Is ov2 better than CLIP?"')


@dataclass(frozen=True)
class Evaluation:
    """One call of `ov2 eval`. `variants` empty: all. `name` begins the keys of its metrics."""

    tasks: tuple[str, ...] = key(each(text), example='["knn"]')
    flags: Flags = key(_flags, default=dict)
    train_data: bool = key(switch, default=False)
    variants: tuple[str, ...] = key(each(text), default=())
    name: str = key(text, default="")


@dataclass(frozen=True)
class Metric:
    """`key`: dotted path in the evaluations' JSON. A value is shown times `scale`, with `unit`."""

    key: str = _key(text, example='"knn.top1"')
    title: str = _key(text, default="")
    unit: str = _key(str, default="")
    scale: float = _key(real(-math.inf), default=1.0)
    better: str = _key(one_of("higher", "lower"), default="higher")
    digits: int = _key(whole(0), default=1)
    learning: str | None = _key(text, default=None)

    @property
    def sign(self) -> int:
        """Larger is better after multiplication with it."""
        return 1 if self.better == "higher" else -1

    @property
    def label(self) -> str:
        return self.title or re.sub(r"[._-]+", " ", self.key)

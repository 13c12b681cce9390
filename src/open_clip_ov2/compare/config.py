"""A comparison's file: what is compared, on which terms, and what is evaluated. docs/evaluation.md lists its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.bench.settings import CaptionLengths
from open_clip_ov2.errors import UserError, nearest
from open_clip_ov2.recipe.counts import sample_count
from open_clip_ov2.tables import (
    Reader,
    each,
    flag_table,
    from_table,
    kebab,
    key,
    one_of,
    read_toml,
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
train_flags = flag_table(dict.fromkeys(SET_BY_US, "`ov2 compare` sets it; leave it out"))
_key = key  # where a field is called `key`


def paragraph(value: Any) -> str:
    return " ".join(text(value).split())


def renamed(value: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(FORMER_NAMES.get(name, name), item) for name, item in value.items()]


def different(read: Reader) -> Reader:
    """A list of one or more different values, which are all read so."""

    def read_all(value: Any) -> tuple[Any, ...]:
        values: tuple[Any, ...] = each(read)(value)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{list(values)}: expected one or more different numbers")
        return values

    return read_all


def table_of(kind: type) -> Reader:
    return lambda value: from_table(kind, "table", table(value))


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
    """Learning rates that are tried."""

    lr: tuple[float, ...] = key(different(real(0, above=True)), example="[1e-3, 2e-3]")


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
    flags: Flags = key(flag_table({}), default=dict)
    train_data: bool = key(switch, default=False)
    variants: tuple[str, ...] = key(each(text), default=())
    name: str = key(text, default="")

    def lacks(self, metric: str, variant: str) -> bool:
        """Whether a metric of this evaluation, by its key, is not known of a variant."""
        begins = [self.name] if self.name else self.tasks
        mine = any(metric.startswith(f"{name}.") for name in begins)
        return mine and bool(self.variants) and variant not in self.variants


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


@dataclass(frozen=True)
class Baseline:
    """A row of the table for which nothing is trained. `results`: a file such as `ov2 eval --out` writes."""

    name: str = key(text)
    results: str = key(text, example='"pixels.json"')


@dataclass(frozen=True)
class _Curve:
    over: str = key(lambda value: kebab(text(value)))


@dataclass(frozen=True)
class Comparison:
    """One file. `curve_over`: a flag of the variants."""

    title: str = key(text, default="")
    about: str = key(paragraph, default="")
    mode: str = key(one_of("samples", "seconds", "flops"), default="samples")
    samples: float = key(sample_count(1), default=0)
    seconds: float = key(real(0, above=True), default=0.0)
    seeds: tuple[int, ...] = key(different(whole(0)), default=(0, 1, 2))
    reference: str = key(text, default="")
    resolution: int | None = key(whole(1), default=None)
    flags: Flags = key(train_flags, default=dict)
    variants: tuple[Variant, ...] = key(tables_of(Variant), name="variant", default=())
    measure: Measure = key(table_of(Measure), default=Measure)
    evaluations: tuple[Evaluation, ...] = key(tables_of(Evaluation), name="evaluate", default=())
    metrics: tuple[Metric, ...] = key(tables_of(Metric), name="metric", default=())
    questions: tuple[Question, ...] = key(tables_of(Question), name="question", default=())
    baselines: tuple[Baseline, ...] = key(tables_of(Baseline), name="baseline", default=())
    search: Search | None = key(table_of(Search), default=None)
    curve_over: str | None = key(lambda value: table_of(_Curve)(value).over, name="curve", default=None)
    notes: tuple[str, ...] = key(each(paragraph), default=())
    name: str = ""

    def __post_init__(self) -> None:
        wanted, other = ("seconds", "samples") if self.mode == "seconds" else ("samples", "seconds")
        if getattr(self, other):
            raise UserError(f"{other}: mode {self.mode!r} needs {wanted} instead")
        if not getattr(self, wanted):
            raise UserError(f"{wanted} is missing")
        if not self.trained:
            raise UserError("there is no [[variant]] to train")
        names = [variant.name for variant in self.variants]
        rows = [*names, *(baseline.name for baseline in self.baselines)]
        if twice := [name for name in rows if rows.count(name) > 1]:
            raise UserError(f"two variants have the name {twice[0]!r}")
        variants = [self.reference or names[0], *(name for one in self.evaluations for name in one.variants)]
        variants += [name for one in self.questions for name in (one.a, one.b)]
        metrics, keys = [one.metric for one in self.questions], [metric.key for metric in self.metrics]
        for what, asked, known in (("variant", variants, names), ("[[metric]]", metrics, keys)):
            for name in asked:
                if name not in known:
                    raise UserError(f"there is no {what} {name!r}{nearest(name, known)}")
        for question in self.questions:
            for name in (question.a, question.b):
                if any(one.lacks(question.metric, name) for one in self.evaluations):
                    raise UserError(
                        f"question: {question.metric} of {name!r}: its [[evaluate]] leaves this variant out"
                    )
        if bare := [one.name for one in self.variants if not one.stages and self.resolution is None]:
            raise UserError(f"variant {bare[0]}: it needs stages, or the file a resolution")
        if self.curve_over and not self.metrics:
            raise UserError("curve: there is no [[metric]] to draw")

    @property
    def budget(self) -> float:
        return self.seconds or self.samples

    @property
    def trained(self) -> tuple[Variant, ...]:
        return tuple(variant for variant in self.variants if variant.trained)

    def scaled(self, seeds: Sequence[int] | None, scale: float) -> Comparison:
        """With the command line's seeds and so many times the file's samples or seconds."""
        seconds, samples = scale * self.seconds, scale * self.samples
        return replace(self, seeds=tuple(seeds or self.seeds), seconds=seconds, samples=samples)


def _with_base(path: Path, read: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's tables, and its base's where it has none; of [flags] each key by itself. `read`: the files that lead
    here. Raises UserError."""
    if path.resolve() in read:
        raise UserError(f"{path}: its base leads back to it; a file cannot be its own base")
    found = read_toml(path)
    base = found.pop("base", None)
    if base is None:
        return found
    before = _with_base(path.parent / text(base), (*read, path.resolve()))
    flags = {kebab(name): item for one in (before, found) for name, item in table(one.get("flags", {})).items()}
    return {**before, **found, "flags": flags}


def load_comparison(path: Path) -> Comparison:
    """A comparison from its file. Raises UserError."""
    found: Comparison = from_table(Comparison, str(path), renamed(_with_base(path)))
    whole_run = (VariantStage(found.resolution, 1.0),) if found.resolution else ()
    return replace(
        found,
        name=path.stem,
        title=found.title or path.stem,
        reference=found.reference or found.variants[0].name,
        variants=tuple(replace(one, stages=one.stages or whole_run) for one in found.variants),
    )

"""A comparison's file: what is compared, on which terms, and what is evaluated.

title = "..."                            # and `about`, one paragraph: what the page says above the table
mode = "samples"                         # equal samples; or "seconds", or "flops" (as many as `reference` needs)
samples = "30k"                          # seconds = 120 in mode "seconds"
seeds = [0, 1, 2]
reference = "ov2"                        # the variant that others are set in relation to
resolution = 32                          # of variants without stages of their own
notes = ["..."]                          # what a reader should know below the table
[flags]                                  # of `ov2 train`, for all variants
[measure]                                # images/s: short runs, in turns, before all others; step memory
repetitions = 3
samples = 2048
caption-tokens = "12:128:64"             # of the captions that memory is measured with: low, high, mean
largest-batch = true                     # find it too
memory-limit-gb = 8                      # GPU memory that a process may use; on a CPU, what a batch may use
[[variant]]                              # or [[arm]]
name = "ov2"
model = "ov2-vit-nano-8"
flags = { keep-ratio = 0.35 }
stages = [{ resolution = 32, share = 0.7 }, { resolution = 48, share = 0.3 }]   # share of the samples
train = false                            # only its speed and memory are measured
[[evaluate]]                             # one call of `ov2 eval` for each run
tasks = ["linear-probe", "knn"]
train-data = true                        # gets --train-data (--probe-data of `ov2 compare`)
variants = ["ov2"]                       # or `arms`; default: all
name = "half"                            # begins the keys of its metrics: half.knn.top1 (default: the task does)
flags = { label-key = "json:label" }
[[metric]]                               # a column: a number of the evaluations' JSON by its dotted path or, as in
                                         # run.caption_loss, of the last validation in training. The verdict is about
                                         # the first one that two variants have.
key = "linear-probe.top1"
title = "linear probe"
unit = "%"
scale = 100
better = "higher"
digits = 1
learning = "linear-probe/top1"           # its name in results.jsonl, for a learning curve
[curve]                                  # metrics over a flag of the variants
over = "keep-ratio"
"""

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

MODES = ("samples", "seconds", "flops")
BATCH = ("batch-size", "accum-freq", "global-batch")
SET_BY_US = ("name", "logs", "model", "seed", "stage", "recipe", "train-data", "val-data", "force-image-size", "epochs")
FORMER_NAMES = {"arm": "variant", "arms": "variants"}
Flags = Mapping[str, Any]
_key = key  # where a field is called `key`


_train_flags = flag_table(SET_BY_US, "`ov2 compare`")


def _flags(value: Any) -> Flags:
    return {kebab(name): one for name, one in table(value).items()}


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = each(whole(0))(value)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{list(seeds)}: expected one or more different integers")
    return seeds


def _paragraph(value: Any) -> str:
    return " ".join(text(value).split())


def _renamed(value: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(FORMER_NAMES.get(name, name), item) for name, item in value.items()]


def _tables(kind: type) -> Reader:
    """A list of tables. An error gives the name of its table, or its number."""

    def read(value: Any) -> tuple[Any, ...]:
        items = enumerate(each(table)(value), 1)
        names = ((str(item.get("name") or item.get("key") or f"number {number}"), item) for number, item in items)
        return tuple(from_table(kind, name, _renamed(item)) for name, item in names)

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
    flags: Flags = key(_train_flags, default=dict)
    stages: tuple[VariantStage, ...] = key(_tables(VariantStage), default=())
    trained: bool = key(switch, default=True, name="train")

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


@dataclass(frozen=True)
class _Curve:
    over: str = key(text)


@dataclass(frozen=True)
class Comparison:
    """One file. `curve_over`: a flag of the variants."""

    title: str = key(text, default="")
    about: str = key(_paragraph, default="")
    mode: str = key(one_of(*MODES), default="samples")
    samples: float = key(sample_count(1), default=0)
    seconds: float = key(real(0, above=True), default=0.0)
    seeds: tuple[int, ...] = key(_seeds, default=(0, 1, 2))
    reference: str = key(text, default="")
    resolution: int | None = key(whole(1), default=None)
    flags: Flags = key(_train_flags, default=dict)
    variants: tuple[Variant, ...] = key(_tables(Variant), name="variant", default=())
    measure: Measure = key(lambda value: from_table(Measure, "table", table(value)), default=Measure)
    evaluations: tuple[Evaluation, ...] = key(_tables(Evaluation), name="evaluate", default=())
    metrics: tuple[Metric, ...] = key(_tables(Metric), name="metric", default=())
    curve_over: str | None = key(
        lambda value: kebab(from_table(_Curve, "table", table(value)).over), name="curve", default=None
    )
    notes: tuple[str, ...] = key(each(_paragraph), default=())
    name: str = ""

    def __post_init__(self) -> None:
        wanted, other = ("seconds", "samples") if self.mode == "seconds" else ("samples", "seconds")
        if getattr(self, other):
            raise UserError(f"{other}: mode {self.mode!r} needs {wanted} instead")
        if not getattr(self, wanted):
            raise UserError(f"{wanted} is missing")
        if not self.variants:
            raise UserError("there is no [[variant]] to compare")
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two variants have the name {name!r}")
        for name in (self.reference, *(name for one in self.evaluations for name in one.variants)):
            if name and name not in names:
                raise UserError(f"there is no variant {name!r}{nearest(name, names)}")
        for variant in self.variants:
            if not variant.stages and self.resolution is None:
                raise UserError(f"variant {variant.name}: it needs stages, or the file a resolution")
        if self.curve_over and not self.metrics:
            raise UserError("curve: there is no [[metric]] to draw")

    @property
    def budget(self) -> float:
        """Samples, or seconds in that mode."""
        return self.seconds if self.mode == "seconds" else self.samples

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def trained(self) -> tuple[Variant, ...]:
        return tuple(variant for variant in self.variants if variant.trained)

    def scaled(self, seeds: Sequence[int] | None, scale: float) -> Comparison:
        """With the command line's seeds and so many times the file's samples or seconds."""
        seeds = tuple(seeds or self.seeds)
        return replace(self, seeds=seeds, seconds=scale * self.seconds, samples=scale * self.samples)


def load_comparison(path: Path) -> Comparison:
    """A comparison from its file. Raises UserError."""
    found: Comparison = from_table(Comparison, str(path), _renamed(read_toml(path)))
    whole_run = (VariantStage(found.resolution, 1.0),) if found.resolution else ()
    return replace(
        found,
        name=path.stem,
        title=found.title or path.stem,
        reference=found.reference or found.variants[0].name,
        variants=tuple(replace(one, stages=one.stages or whole_run) for one in found.variants),
    )

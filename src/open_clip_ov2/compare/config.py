"""A comparison's file: what is compared, on which terms, and what is evaluated.

title = "..."                            # and `about`, one paragraph: what the page says above the table
mode = "samples"                         # equal samples; or "seconds", or "flops" (as many as `reference` needs)
samples = "30k"                          # seconds = 120 in mode "seconds"
seeds = [0, 1, 2]
reference = "ov2"                        # the variant that others are set in relation to
resolution = 32                          # of variants without stages of their own
notes = ["..."]                          # what a reader should know below the table
base = "study.toml"                      # another such file, beside this one, whose keys hold where this one has none
[flags]                                  # of `ov2 train`, for all variants; added to those of `base`
[measure]                                # images/s: short runs, in turns, before all others; step memory
repetitions = 3
samples = 2048
caption-tokens = "12:128:64"             # of the captions that memory is measured with: low, high, mean
largest-batch = true                     # find it too
memory-limit-gb = 8                      # GPU memory that a process may use; on a CPU, what a batch may use
[search]                                 # learning rates of variants that have no `lr` of their own (search.py)
lr = [1e-3, 2e-3, 4e-3]
samples = "4k"                           # of each run of the search
[[variant]]                              # or [[arm]]
name = "ov2"
model = "ov2-vit-nano-8"
flags = { keep-ratio = 0.35 }
stages = [{ resolution = 32, share = 0.7 }, { resolution = 48, share = 0.3 }]   # share of the samples
train = false                            # only its speed and memory are measured
samples = 64                             # instead of the file's: with `lr = 0`, random weights for nothing
[[evaluate]]                             # one call of `ov2 eval` for each run
tasks = ["linear-probe", "knn"]
train-data = true                        # gets --train-data (--probe-data of `ov2 compare`)
variants = ["ov2"]                       # or `arms`; default: all
name = "half"                            # begins the keys of its metrics: half.knn.top1 (default: the task does)
flags = { label-key = "json:label" }
[[metric]]                               # a column: a number of the evaluations' JSON by its dotted path or, as in
                                         # run.caption_loss, of the last validation in training
key = "linear-probe.top1"
title = "linear probe"
unit = "%"
scale = 100
better = "higher"
digits = 1
learning = "linear-probe/top1"           # its name in results.jsonl, for a learning curve
[[question]]                             # answered above all else (answers.py); default: `reference` against the others
text = "Is A better than B in the same time?"
a = "ov2"
b = "CLIP"
metric = "knn.top1"
[curve]                                  # metrics over a flag of the variants
over = "keep-ratio"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.parts import (
    Evaluation,
    Flags,
    Measure,
    Metric,
    Question,
    Search,
    Variant,
    VariantStage,
    paragraph,
    renamed,
    tables_of,
    train_flags,
)
from open_clip_ov2.errors import UserError, nearest
from open_clip_ov2.recipe.counts import sample_count
from open_clip_ov2.tables import each, from_table, kebab, key, one_of, read_toml, real, table, text, whole

MODES = ("samples", "seconds", "flops")


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = each(whole(0))(value)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{list(seeds)}: expected one or more different integers")
    return seeds


@dataclass(frozen=True)
class _Curve:
    over: str = key(text)


@dataclass(frozen=True)
class Comparison:
    """One file. `curve_over`: a flag of the variants."""

    title: str = key(text, default="")
    about: str = key(paragraph, default="")
    mode: str = key(one_of(*MODES), default="samples")
    samples: float = key(sample_count(1), default=0)
    seconds: float = key(real(0, above=True), default=0.0)
    seeds: tuple[int, ...] = key(_seeds, default=(0, 1, 2))
    reference: str = key(text, default="")
    resolution: int | None = key(whole(1), default=None)
    flags: Flags = key(train_flags, default=dict)
    variants: tuple[Variant, ...] = key(tables_of(Variant), name="variant", default=())
    measure: Measure = key(lambda value: from_table(Measure, "table", table(value)), default=Measure)
    evaluations: tuple[Evaluation, ...] = key(tables_of(Evaluation), name="evaluate", default=())
    metrics: tuple[Metric, ...] = key(tables_of(Metric), name="metric", default=())
    questions: tuple[Question, ...] = key(tables_of(Question), name="question", default=())
    search: Search | None = key(lambda value: from_table(Search, "table", table(value)), default=None)
    curve_over: str | None = key(
        lambda value: kebab(from_table(_Curve, "table", table(value)).over), name="curve", default=None
    )
    notes: tuple[str, ...] = key(each(paragraph), default=())
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
        asked = [name for one in self.questions for name in (one.a, one.b)]
        for name in (self.reference, *(name for one in self.evaluations for name in one.variants), *asked):
            if name and name not in names:
                raise UserError(f"there is no variant {name!r}{nearest(name, names)}")
        for variant in self.variants:
            if not variant.stages and self.resolution is None:
                raise UserError(f"variant {variant.name}: it needs stages, or the file a resolution")
        keys = [metric.key for metric in self.metrics]
        for question in self.questions:
            if question.metric not in keys:
                raise UserError(f"question: there is no [[metric]] {question.metric!r}{nearest(question.metric, keys)}")
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
        search = self.search and replace(self.search, samples=max(1, round(scale * self.search.samples)))
        return replace(self, seeds=seeds, seconds=scale * self.seconds, samples=scale * self.samples, search=search)


def _with_base(path: Path) -> dict[str, Any]:
    """The file's tables, and its base's where it has none; of [flags] each key by itself. Raises UserError."""
    found = read_toml(path)
    base = found.pop("base", None)
    if base is None:
        return found
    before = _with_base(path.parent / text(base))
    return {**before, **found, "flags": {**table(before.get("flags", {})), **table(found.get("flags", {}))}}


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

"""A comparison's file -> what is compared, on which terms, and what is asked of each run.

title = "..."                            # and `about`, one paragraph: what the page says above the table
mode = "samples"                         # equal samples; or "seconds", or "flops" (as many as `reference` needs)
samples = "30k"                          # seconds = 120 in mode "seconds"
seeds = [0, 1, 2]
reference = "ov2"                        # the arm that others are set in relation to
resolution = 32                          # of arms without stages of their own
[flags]                                  # of `ov2 train`, for all arms
[measure]                                # images/s: short runs, in turn, before all others; step memory
repetitions = 3
samples = 2048
caption-tokens = "12:128:64"             # of the captions that memory is measured with: low, high, mean
largest-batch = true                     # look for it too
memory-limit-gb = 8                      # what a GPU lets a process have; what a CPU's largest batch may count up to
[[arm]]
name = "ov2"
model = "ov2-vit-nano-8"
flags = { keep-ratio = 0.35 }
stages = [{ resolution = 32, share = 0.7 }, { resolution = 48, share = 0.3 }]   # share of the samples
train = false                            # measured alone
[[evaluate]]                             # one call of `ov2 eval` for each run
tasks = ["linear-probe", "knn"]
train-data = true                        # gets --train-data (--probe-data of `ov2 compare`)
arms = ["ov2"]                           # default: all
name = "half"                            # begins the keys of its metrics: half.knn.top1 (default: the task does)
flags = { label-key = "json:label" }
[[metric]]                               # a column: a figure of the evaluations' JSON by its dotted path, or, as in
                                         # run.caption_loss, of the last validation in training
key = "linear-probe.top1"
title = "linear probe"
unit = "%"
scale = 100
better = "higher"
learning = "linear-probe/top1"           # its name in results.jsonl, for a learning curve
[curve]                                  # metrics over a flag of the arms
over = "keep-ratio"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from open_clip_ov2.compare.bench.cases import CaptionLengths

MODES = ("samples", "seconds", "flops")
Flags = Mapping[str, Any]


@dataclass(frozen=True)
class ArmStage:
    """`share` of the run's samples."""

    resolution: int
    share: float


@dataclass(frozen=True)
class Arm:
    """`trained` false: its speed and memory are measured, and that is all."""

    name: str
    model: str
    flags: Flags
    stages: tuple[ArmStage, ...]
    trained: bool


@dataclass(frozen=True)
class Measure:
    """Before training. `samples`: of each run that is timed."""

    repetitions: int = 3
    samples: int = 2048
    lengths: CaptionLengths = field(default_factory=CaptionLengths)
    largest_batch: bool = False
    memory_limit_gb: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One call of `ov2 eval`. `arms` empty: all. `name` begins the keys of its metrics."""

    name: str
    tasks: tuple[str, ...]
    flags: Flags
    train_data: bool
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """`key`: dotted path in the evaluations' JSON. A value is shown times `scale`, with `unit`."""

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    better: str = "higher"
    digits: int = 1
    learning: str | None = None


@dataclass(frozen=True)
class Comparison:
    """One file. `budget`: samples, or seconds in that mode."""

    name: str
    title: str
    about: str
    mode: str
    budget: float
    seeds: tuple[int, ...]
    reference: str
    flags: Flags
    arms: tuple[Arm, ...]
    measure: Measure
    evaluations: tuple[Evaluation, ...]
    metrics: tuple[Metric, ...]
    curve_over: str | None = None
    notes: tuple[str, ...] = field(default=())

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def trained(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.trained)

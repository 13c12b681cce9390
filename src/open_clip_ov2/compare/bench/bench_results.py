"""What was measured, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from open_clip_ov2.compare.bench.cases import Case

REFERENCE = "ov2"  # the arm that all others are compared with


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """One arm in one case. `step_s`: seconds of a step by the clock, one a repetition, in their order; `cpu_s`: of all
    processors together, which others at work on the machine change less.

    `step_bytes`: the step's peak above weights, gradients and optimizer state, which are `fixed_bytes`. `image_flops`:
    model FLOPs of an image and its caption. `failure` says why there is nothing else.
    """

    arm: str
    model: str
    case: Case
    step_s: tuple[float, ...] = ()
    cpu_s: tuple[float, ...] = ()
    step_bytes: int = 0
    fixed_bytes: int = 0
    image_flops: float = 0.0
    failure: str | None = None

    @property
    def images_per_second(self) -> Spread:
        return Spread.of([self.case.batch_size / seconds for seconds in self.step_s])

    def utilisation(self, peak_flops: float) -> float:
        """Share of the device's matrix rate, 0 to 1."""
        return self.images_per_second.median * self.image_flops / peak_flops


@dataclass(frozen=True)
class Largest:
    """The largest batch of an arm that trains; 0: not even the smallest."""

    arm: str
    resolution: int
    precision: str
    batch_size: int


@dataclass(frozen=True)
class Results:
    """`peak_flops`: measured dense matrix rate of the device, by precision. `machine`: what it ran on, in words."""

    measured: tuple[Measured, ...]
    largest: tuple[Largest, ...]
    peak_flops: dict[str, float]
    machine: dict[str, str]

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(one.case for one in self.measured))

    def of(self, case: Case) -> list[Measured]:
        return [one for one in self.measured if one.case == case]


def time_ratio(mine: Sequence[float], reference: Sequence[float]) -> Spread | None:
    """How many times the reference's time, within each repetition: what slows the machine slows both."""
    if not mine or not reference:
        return None
    return Spread.of([one / other for one, other in zip(mine, reference, strict=True)])


def memory_ratio(one: Measured, reference: Measured) -> float | None:
    return one.step_bytes / reference.step_bytes if one.step_bytes and reference.step_bytes else None


def best_batch(results: Results, arm: str, resolution: int, precision: str) -> Measured | None:
    """The case of the highest images per second of an arm."""
    ran = [
        one for one in results.measured
        if one.step_s and (one.arm, one.case.resolution, one.case.precision) == (arm, resolution, precision)
    ]  # fmt: skip
    return max(ran, key=lambda one: one.images_per_second.median, default=None)

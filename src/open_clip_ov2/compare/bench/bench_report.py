"""What `ov2 bench` measured and what follows from it: as a Markdown page and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from open_clip_ov2.compare.bench.settings import BenchSettings, Case

REFERENCE = "ov2"  # the variant that all others are compared with
MB, GFLOP, TFLOP = 1e6, 1e9, 1e12
COLUMNS = (
    "variant", "model", "ms a step", "images/s", "time / ov2", "CPU time / ov2", "step memory, MB", "memory / ov2",
    "GFLOP an image", "floor, ms", "MFU",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str) -> str:
        low, middle, high = (form.format(number) for number in (self.low, self.median, self.high))
        return f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Measured:
    """One variant in one case. `step_s`: seconds of a step by the clock, one a repetition, in their order; `cpu_s`: of
    all processors together. `step_bytes`: the step's peak above weights, gradients and optimizer state, which are
    `fixed_bytes`. `image_flops`: of an image and its caption. `failure` says why there is nothing else."""

    name: str
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

    def mfu(self, peak_flops: float) -> float:
        """Model FLOPs utilization: share of the device's matrix rate, 0 to 1."""
        return self.images_per_second.median * self.image_flops / peak_flops


@dataclass(frozen=True)
class Results:
    """`largest`: variants, each with a case whose batch is the largest that trains (0: not even the smallest does).
    `peak_flops`: measured dense matrix rate of the device, by precision. `machine`: what it ran on, in words."""

    measured: tuple[Measured, ...] = ()
    largest: tuple[tuple[str, Case], ...] = ()
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(one.case for one in self.measured))

    def ratios(self, one: Measured) -> dict[str, Any]:
        """How many times the reference's time, CPU time (each a Spread) and step memory; empty without a reference.
        Times are compared within each repetition: what slows the machine slows both."""
        references = (other for other in self.measured if (other.name, other.case) == (REFERENCE, one.case))
        reference = next(references, None)
        if reference is None or not reference.step_s or not one.step_s:
            return {}
        return {
            "time_ratio": Spread.of([a / b for a, b in zip(one.step_s, reference.step_s, strict=True)]),
            "cpu_time_ratio": Spread.of([a / b for a, b in zip(one.cpu_s, reference.cpu_s, strict=True)]),
            "memory_ratio": one.step_bytes / reference.step_bytes if reference.step_bytes else None,
        }


def as_markdown(settings: BenchSettings, results: Results, command: str, date: str) -> str:
    lengths = settings.caption_tokens
    machine = ", ".join(text if name == "device" else f"{name} {text}" for name, text in results.machine.items())
    lines = [
        f"`{command}`, {date}", "", machine, "",
        f"Captions of {lengths.low} to {lengths.high} tokens, mean {lengths.mean:g}; median (least to greatest) of "
        f"{settings.repetitions} repetitions of {settings.steps} steps, variants in turns"
        f"{'; compiled' if settings.compile else ''}.",
    ]  # fmt: skip
    for case in results.cases:
        rows = [_row(one, results) for one in results.measured if one.case == case]
        lines += _section(f"{case.resolution} px, {case.precision}, batch {case.batch_size}", COLUMNS, rows)
        rate = results.peak_flops.get(case.precision)
        if rate:
            lines += ["", f"Floor and MFU are relative to {rate / TFLOP:,.4g} TFLOP/s (measured matrix product)."]
    return "\n".join([*lines, *_best(results), *_largest(results)]) + "\n"


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"## {title}", "", *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))]


def _row(one: Measured, results: Results) -> list[str]:
    if not one.step_s:
        return [one.name, one.model, one.failure or "not measured", *[""] * (len(COLUMNS) - 3)]
    rate, ratios = results.peak_flops[one.case.precision], results.ratios(one)
    return [
        one.name,
        one.model,
        Spread.of([1e3 * seconds for seconds in one.step_s]).text("{:,.4g}"),
        f"{one.images_per_second.median:,.4g}",
        ratios["time_ratio"].text("{:.2f}") if ratios else "",
        ratios["cpu_time_ratio"].text("{:.2f}") if ratios else "",
        f"{one.step_bytes / MB:,.4g}",
        f"{ratios['memory_ratio']:.2f}" if ratios.get("memory_ratio") else "",
        f"{one.image_flops / GFLOP:,.4g}",
        f"{1e3 * one.case.batch_size * one.image_flops / rate:,.4g}",
        f"{one.mfu(rate):.1%}",
    ]


def _best(results: Results) -> list[str]:
    """Each variant at the batch of its most images/s, if several were tried."""
    if len({case.batch_size for case in results.cases}) < 2:
        return []
    best: dict[tuple[str, int, str], Measured] = {}
    for one in results.measured:
        where = (one.name, one.case.resolution, one.case.precision)
        if one.step_s:
            best[where] = max(best.get(where, one), one, key=lambda measured: measured.images_per_second.median)
    rows = []
    for (name, resolution, precision), one in best.items():
        ours, speed = best.get((REFERENCE, resolution, precision)), one.images_per_second.median
        faster = f"{ours.images_per_second.median / speed:.2f}" if ours else ""
        used = f"{one.mfu(results.peak_flops[precision]):.1%}"
        rows.append([name, f"{resolution} px", precision, str(one.case.batch_size), f"{speed:,.4g}", faster, used])
    columns = ("variant", "resolution", "precision", "best batch", "images/s", "ov2's / its", "MFU")
    return _section("Each at its best batch", columns, rows)


def _largest(results: Results) -> list[str]:
    ours = {replace(case, batch_size=0): case.batch_size for name, case in results.largest if name == REFERENCE}
    rows = []
    for name, case in results.largest:
        mine = ours.get(replace(case, batch_size=0))
        ratio = f"{mine / case.batch_size:.2f}" if mine and case.batch_size else ""
        rows.append([name, f"{case.resolution} px", case.precision, f"{case.batch_size:,}", ratio])
    columns = ("variant", "resolution", "precision", "largest batch", "ov2's / its")
    return _section("Largest batch", columns, rows) if rows else []


def as_json(settings: BenchSettings, results: Results, command: str, date: str) -> dict[str, Any]:
    """All that was measured, and what the tables say. `arm` is the name of a variant in files since 0.1."""
    plain = asdict(settings)
    return {
        "command": command,
        "date": date,
        "machine": results.machine,
        "settings": {"arms": plain.pop("variants"), **plain},
        "peak_flops": results.peak_flops,
        "measured": [_plain(one, results) for one in results.measured],
        "largest_batch": [{"arm": name, **asdict(case)} for name, case in results.largest],
    }


def _plain(one: Measured, results: Results) -> dict[str, Any]:
    plain = asdict(one)
    plain = {"arm": plain.pop("name"), **plain.pop("case"), **plain}
    if one.step_s:
        plain["images_per_second"] = asdict(one.images_per_second)
        plain["utilisation"] = one.mfu(results.peak_flops[one.case.precision])
    ratios = results.ratios(one).items()
    return plain | {name: asdict(ratio) if isinstance(ratio, Spread) else ratio for name, ratio in ratios}

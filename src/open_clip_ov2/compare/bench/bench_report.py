"""What `ov2 bench` measured and what follows from it: as a Markdown page, as JSON, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.bench.settings import BenchSettings, Case
from open_clip_ov2.tracking.figures import figure

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
    all processors together, which depends less on what else runs on the machine.

    `step_bytes`: the step's peak above weights, gradients and optimizer state, which are `fixed_bytes`. `image_flops`:
    model FLOPs of an image and its caption. `failure` says why there is nothing else.
    """

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

    def ratios(self, reference: Measured) -> tuple[Spread, Spread, float | None]:
        """How many times the reference's time, CPU time (both within each repetition: what slows the machine slows
        both), and step memory."""
        pairs = ((self.step_s, reference.step_s), (self.cpu_s, reference.cpu_s))
        times = [Spread.of([a / b for a, b in zip(mine, theirs, strict=True)]) for mine, theirs in pairs]
        memory = self.step_bytes / reference.step_bytes if self.step_bytes and reference.step_bytes else None
        return times[0], times[1], memory


@dataclass(frozen=True)
class Largest:
    """The largest batch of a variant that trains; 0: not even the smallest."""

    name: str
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

    def reference(self, case: Case) -> Measured | None:
        return next((one for one in self.of(case) if one.name == REFERENCE and one.step_s), None)


def as_markdown(settings: BenchSettings, results: Results, command: str, date: str) -> str:
    lengths = settings.lengths
    machine = ", ".join(text if name == "device" else f"{name} {text}" for name, text in results.machine.items())
    lines = [f"`{command}`, {date}", "", machine, ""]
    lines += [
        f"Captions of {lengths.low} to {lengths.high} tokens, mean {lengths.mean:g}; median (least to greatest) of "
        f"{settings.repetitions} repetitions of {settings.steps} steps, variants in turns"
        f"{'; compiled' if settings.compile else ''}.",
    ]
    for case in results.cases:
        lines += ["", f"## {case.resolution} px, {case.precision}, batch {case.batch_size}", ""]
        lines += _table(COLUMNS, [_row(one, results) for one in results.of(case)])
        rate = results.peak_flops.get(case.precision)
        if rate:
            lines += ["", f"Floor and MFU are relative to {rate / TFLOP:,.4g} TFLOP/s (measured matrix product)."]
    return "\n".join([*lines, *_best(settings, results), *_largest(results)]) + "\n"


def _row(one: Measured, results: Results) -> list[str]:
    if one.failure or not one.step_s:
        return [one.name, one.model, one.failure or "not measured", *[""] * (len(COLUMNS) - 3)]
    reference, rate = results.reference(one.case), results.peak_flops[one.case.precision]
    time, cpu, memory = one.ratios(reference) if reference else (None, None, None)
    return [
        one.name,
        one.model,
        Spread.of([1e3 * seconds for seconds in one.step_s]).text("{:,.4g}"),
        f"{one.images_per_second.median:,.4g}",
        time.text("{:.2f}") if time else "",
        cpu.text("{:.2f}") if cpu else "",
        f"{one.step_bytes / MB:,.4g}",
        f"{memory:.2f}" if memory else "",
        f"{one.image_flops / GFLOP:,.4g}",
        f"{1e3 * one.case.batch_size * one.image_flops / rate:,.4g}",
        f"{one.mfu(rate):.1%}",
    ]


def _best(settings: BenchSettings, results: Results) -> list[str]:
    """Each variant at the batch of its most images/s, if several were tried."""
    best: dict[tuple[str, int, str], Measured] = {}
    for one in results.measured:
        where = (one.name, one.case.resolution, one.case.precision)
        if one.step_s and (where not in best or one.images_per_second.median > best[where].images_per_second.median):
            best[where] = one
    if len({case.batch_size for case in results.cases}) < 2:
        return []
    rows = []
    for (name, resolution, precision), one in best.items():
        ours, speed = best.get((REFERENCE, resolution, precision)), one.images_per_second.median
        faster = f"{ours.images_per_second.median / speed:.2f}" if ours else ""
        used = f"{one.mfu(results.peak_flops[precision]):.1%}"
        rows.append([name, f"{resolution} px", precision, str(one.case.batch_size), f"{speed:,.4g}", faster, used])
    columns = ("variant", "resolution", "precision", "best batch", "images/s", "ov2's / its", "MFU")
    return ["", "## Each at its best batch", "", *_table(columns, rows)]


def _largest(results: Results) -> list[str]:
    if not results.largest:
        return []
    ours = {(one.resolution, one.precision): one.batch_size for one in results.largest if one.name == REFERENCE}
    rows = []
    for one in results.largest:
        mine = ours.get((one.resolution, one.precision))
        ratio = f"{mine / one.batch_size:.2f}" if mine and one.batch_size else ""
        rows.append([one.name, f"{one.resolution} px", one.precision, f"{one.batch_size:,}", ratio])
    columns = ("variant", "resolution", "precision", "largest batch", "ov2's / its")
    return ["", "## Largest batch", "", *_table(columns, rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


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
        "largest_batch": [_arm(asdict(one)) for one in results.largest],
    }


def _arm(plain: dict[str, Any]) -> dict[str, Any]:
    return {"arm": plain.pop("name"), **plain}


def _plain(one: Measured, results: Results) -> dict[str, Any]:
    plain = _arm(asdict(one))
    plain |= plain.pop("case")
    reference = results.reference(one.case)
    if one.step_s:
        plain["images_per_second"] = asdict(one.images_per_second)
        plain["utilisation"] = one.mfu(results.peak_flops[one.case.precision])
    if one.step_s and reference:
        time, cpu, memory = one.ratios(reference)
        plain |= {"time_ratio": asdict(time), "cpu_time_ratio": asdict(cpu), "memory_ratio": memory}
    return plain


def plot_results(results: Results, out: Path) -> None:
    """PNG: images/s (median, least to greatest) and step memory, a group of bars for each case."""
    with figure(out, columns=2, size=(5.0 + 2.5 * len(results.cases), 4.2)) as (speeds, memory):
        _bars(speeds, results, lambda one: one.images_per_second, "images/s (median, least to greatest)")
        _bars(memory, results, lambda one: Spread.of([one.step_bytes / MB]), "step memory, MB")
        speeds.legend(frameon=False)
        speeds.figure.suptitle(results.machine.get("device", ""), fontsize="medium")


def _bars(axes: Any, results: Results, value: Callable[[Measured], Spread], title: str) -> None:
    cases, names = results.cases, list(dict.fromkeys(one.name for one in results.measured))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [(cases.index(one.case), value(one)) for one in results.measured if one.name == name and one.step_s]
        places, heights = [place + index * width for place, _ in found], [one.median for _, one in found]
        reach = [[one.median - one.low for _, one in found], [one.high - one.median for _, one in found]]
        axes.bar(places, heights, width, yerr=reach if found else None, capsize=2, label=name)
    ticks = [f"{case.resolution} px\n{case.precision}\nbatch {case.batch_size}" for case in cases]
    axes.set_xticks([place + width * (len(names) - 1) / 2 for place in range(len(cases))], ticks)
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)

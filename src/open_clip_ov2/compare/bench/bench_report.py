"""Results as a Markdown page and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from open_clip_ov2.compare.bench.bench_results import (
    REFERENCE,
    Measured,
    Results,
    Spread,
    best_batch,
    memory_ratio,
    time_ratio,
)
from open_clip_ov2.compare.bench.cases import BenchSettings, Case

MB, GFLOP, TFLOP = 1e6, 1e9, 1e12
COLUMNS = (
    "arm", "model", "ms a step", "images/s", "time / ov2", "CPU time / ov2", "step memory, MB", "memory / ov2",
    "GFLOP an image", "floor, ms", "utilisation",
)  # fmt: skip


def as_markdown(settings: BenchSettings, results: Results, command: str, date: str) -> str:
    lines = [f"`{command}`, {date}", ""]
    lines += [", ".join(f"{name} {text}" if name != "device" else text for name, text in results.machine.items()), ""]
    lengths = settings.lengths
    lines += [
        f"Captions of {lengths.low} to {lengths.high} tokens, mean {lengths.mean:g}; median (least to greatest) of "
        f"{settings.repetitions} repetitions of {settings.steps} steps, arms in turns"
        f"{'; compiled' if settings.compile else ''}.",
    ]
    for case in results.cases:
        lines += ["", f"## {case.resolution} px, {case.precision}, batch {case.batch_size}", ""]
        lines += _table(COLUMNS, [_row(one, results, case) for one in results.of(case)])
        rate = results.peak_flops.get(case.precision)
        if rate:
            lines += ["", f"Floor and utilisation: of the {rate / TFLOP:,.4g} TFLOP/s measured here."]
    return "\n".join([*lines, *_best(settings, results), *_largest(results)]) + "\n"


def _row(one: Measured, results: Results, case: Case) -> list[str]:
    reference = _reference(results, case)
    if one.failure or not one.step_s:
        return [one.arm, one.model, one.failure or "not measured", *[""] * (len(COLUMNS) - 3)]
    rate = results.peak_flops[case.precision]
    ratio = time_ratio(one.step_s, reference.step_s) if reference else None
    cpu = time_ratio(one.cpu_s, reference.cpu_s) if reference else None
    memory = memory_ratio(one, reference) if reference else None
    return [
        one.arm,
        one.model,
        _spread(Spread.of([1e3 * seconds for seconds in one.step_s]), "{:,.4g}"),
        f"{one.images_per_second.median:,.4g}",
        "" if ratio is None else _spread(ratio, "{:.2f}"),
        "" if cpu is None else _spread(cpu, "{:.2f}"),
        f"{one.step_bytes / MB:,.4g}",
        "" if memory is None else f"{memory:.2f}",
        f"{one.image_flops / GFLOP:,.4g}",
        f"{1e3 * case.batch_size * one.image_flops / rate:,.4g}",
        f"{one.utilisation(rate):.1%}",
    ]


def _reference(results: Results, case: Case) -> Measured | None:
    return next((one for one in results.of(case) if one.arm == REFERENCE and one.step_s), None)


def _spread(value: Spread, form: str) -> str:
    low, middle, high = (form.format(number) for number in (value.low, value.median, value.high))
    return f"{middle} ({low} to {high})"


def _best(settings: BenchSettings, results: Results) -> list[str]:
    """Each arm at its own best batch, where several were tried."""
    if len({case.batch_size for case in results.cases}) < 2:
        return []
    rows = []
    for resolution, precision in dict.fromkeys((case.resolution, case.precision) for case in results.cases):
        ours = best_batch(results, REFERENCE, resolution, precision)
        for arm in settings.arms:
            one = best_batch(results, arm, resolution, precision)
            if one is None:
                continue
            speed = one.images_per_second.median
            slower = f"{ours.images_per_second.median / speed:.2f}" if ours else ""
            used = f"{one.utilisation(results.peak_flops[precision]):.1%}"
            rows.append([arm, f"{resolution} px", precision, str(one.case.batch_size), f"{speed:,.4g}", slower, used])
    columns = ("arm", "resolution", "precision", "best batch", "images/s", "ov2's / its", "utilisation")
    return ["", "## Each at its best batch", "", *_table(columns, rows)]


def _largest(results: Results) -> list[str]:
    if not results.largest:
        return []
    ours = {(one.resolution, one.precision): one.batch_size for one in results.largest if one.arm == REFERENCE}
    rows = []
    for one in results.largest:
        mine = ours.get((one.resolution, one.precision))
        ratio = f"{mine / one.batch_size:.2f}" if mine and one.batch_size else ""
        rows.append([one.arm, f"{one.resolution} px", one.precision, f"{one.batch_size:,}", ratio])
    columns = ("arm", "resolution", "precision", "largest batch", "ov2's / its")
    return ["", "## Largest batch", "", *_table(columns, rows)]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def as_json(settings: BenchSettings, results: Results, command: str, date: str) -> dict[str, Any]:
    """All that was measured, and what the tables say."""
    return {
        "command": command,
        "date": date,
        "machine": results.machine,
        "settings": asdict(settings),
        "peak_flops": results.peak_flops,
        "measured": [_measured(one, results) for one in results.measured],
        "largest_batch": [asdict(one) for one in results.largest],
    }


def _measured(one: Measured, results: Results) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(one).items() if key != "case"} | asdict(one.case)
    reference = _reference(results, one.case)
    if one.step_s:
        plain["images_per_second"] = asdict(one.images_per_second)
        plain["utilisation"] = one.utilisation(results.peak_flops[one.case.precision])
    if reference is not None and one.step_s:
        for name, ratio in (
            ("time_ratio", time_ratio(one.step_s, reference.step_s)),
            ("cpu_time_ratio", time_ratio(one.cpu_s, reference.cpu_s)),
        ):
            plain[name] = asdict(ratio) if ratio else None
        plain["memory_ratio"] = memory_ratio(one, reference)
    return plain

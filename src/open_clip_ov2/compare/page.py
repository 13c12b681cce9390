"""A comparison for people: its table as cells, Markdown and one HTML page (page.html) with everything in it."""

from __future__ import annotations

import csv
import io
import shlex
import statistics
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.plots import Plot
from open_clip_ov2.compare.results import Found, VariantResult, best, summary, write_csv
from open_clip_ov2.compare.verdict import verdict
from open_clip_ov2.recipe.counts import short_count

NONE = "–"
# What holds for all comparisons.
TERMS = (
    "Within a comparison every variant has the same images and captions, in the order and with the crops that a seed "
    "gives. What else differs, besides model, resolution and samples, is listed under the table.",
    "ov2 is trained by this package's step, CLIP and CoCa exactly as stock OpenCLIP trains them, which is part of the "
    "difference in speed and memory.",
    "Images/s are measured before training by short runs in turns, with nothing beside them: the median and the range. "
    "Ratios are taken within each repetition. Seconds are samples divided by these images/s, since the clock of runs "
    "that train side by side, or on a busy machine, says little.",
    "Step memory is the peak of a step above weights, gradients and optimizer state, by the allocator's count, at the "
    "batch size of training.",
    "Learning curves and final values are of held-out images; ± is the standard deviation over seeds (n - 1). Bold: "
    "better than all others with every seed. A difference is beyond the spread of seeds if every seed of the better "
    "variant beats every seed of the other.",
)


def header(found: Found) -> list[str]:
    fixed = ["", "images/s", f"× {found.comparison.reference}", *(title for title, _ in _costs(found))]
    metrics = (
        f"{_titled(metric, ', {}')} {'↑' if metric.better == 'higher' else '↓'}" for metric in found.comparison.metrics
    )
    return [*fixed, "samples", "training, s", *metrics]


def _titled(metric: Metric, form: str) -> str:
    return metric.label + (form.format(metric.unit) if metric.unit else "")


def _costs(found: Found) -> list[tuple[str, dict[str, float | None]]]:
    """Columns that any variant has something in, by variant."""
    columns: list[tuple[str, dict[str, float | None]]] = [
        ("step memory, MiB", {one.name: one.cost.step_memory_mb for one in found.variants}),
        ("largest batch", {one.name: one.cost.largest_batch for one in found.variants}),
    ]
    return [(title, values) for title, values in columns if any(value is not None for value in values.values())]


def rows(found: Found) -> list[list[str]]:
    return [_row(found, variant) for variant in found.variants]


def _row(found: Found, variant: VariantResult) -> list[str]:
    costs = [values[variant.name] for _, values in _costs(found)]
    cells = [variant.name, spread(variant.rates, 0), spread(variant.ratios, 2)]
    cells += [NONE if value is None else f"{value:,.0f}" for value in costs]
    cells += [short_count(variant.samples), f"{variant.seconds:,.0f}"] if variant.trained else [NONE, NONE]
    return cells + [mean_and_sd(metric, variant) for metric in found.comparison.metrics]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the least and the greatest in brackets."""
    if not values:
        return NONE
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def mean_and_sd(metric: Metric, variant: VariantResult) -> str:
    """Mean ± standard deviation over seeds."""
    total = summary(variant.shown(metric))
    if total is None:
        return NONE
    text = f"{total.mean:.{metric.digits}f}"
    return text if total.sd is None else f"{text} ± {total.sd:.{metric.digits}f}"


def marked(found: Found) -> list[list[tuple[str, bool]]]:
    """The rows' cells, each with whether its variant is better than all others with every seed."""
    winners, metrics = best(found), found.comparison.metrics
    out = []
    for variant, cells in zip(found.variants, rows(found), strict=True):
        won = [winners.get(metric.key) == variant.name for metric in metrics]
        out.append(list(zip(cells, [False] * (len(cells) - len(won)) + won, strict=True)))
    return out


def markdown(found: Found) -> str:
    first = header(found)
    body = [[f"**{cell}**" if bold else cell for cell, bold in cells] for cells in marked(found)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (first, ["---"] * len(first), *body))


def budget(found: Found) -> str:
    """What was equal, in a sentence."""
    comparison = found.comparison
    seeds = sorted({seed for variant in found.trained for seed in variant.seeds})
    each = {
        "samples": f"{comparison.budget:,.0f} samples each",
        "seconds": f"{comparison.budget:,.0f} seconds each: as many samples as a variant's images/s make of them",
        "flops": f"As many FLOPs each as {comparison.reference} needs for {comparison.budget:,.0f} samples",
    }[comparison.mode]
    counted = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    return f"{each}; {counted}. Speeds: {found.machine}."


def terms(found: Found) -> list[str]:
    """What this comparison's variants have in common, what not, and what their memory was measured with."""
    comparison, measure = found.comparison, found.comparison.measure
    out = [f"Flags of all variants: {shlex.join(to_argv(comparison.flags))}."]
    out += [
        f"{one.name} has, and {comparison.reference} in brackets: {'; '.join(one.unlike)}."
        for one in found.variants
        if one.unlike
    ]
    if any(one.cost.step_memory_mb is not None for one in found.variants):
        lengths = measure.lengths
        captions = f"captions of {lengths.low} to {lengths.high} tokens, {lengths.mean:g} on average"
        limit = "" if measure.memory_limit_gb is None else f" under {measure.memory_limit_gb:g} GB, weights included"
        batch = f"; largest batch: by bisection to 8 images{limit}" if measure.largest_batch else ""
        out.append(f"Memory: noise at the resolution of the last stage, {captions}{batch}.")
    return out


def results_md(title: str, found: Sequence[Found], command: str) -> str:
    lines = [f"# {title}", "", *(line for one in found for line in (_led(one, found, "**{}**: "), ""))]
    lines += [f"    {command}", "", *(f"- {term}" for term in TERMS)]
    for one in found:
        lines += ["", f"## {one.comparison.title}", "", one.comparison.about, "", budget(one), "", markdown(one)]
        lines += [line for note in (*one.comparison.notes, *terms(one)) for line in (note, "")]
    return "\n".join(lines) + "\n"


def _led(one: Found, found: Sequence[Found], form: str) -> str:
    """The verdict, under its comparison's title if there are several."""
    return (form.format(one.comparison.title) if len(found) > 1 else "") + verdict(one)


def results_csv(found: Sequence[Found]) -> str:
    out = io.StringIO()
    write_csv(found, csv.writer(out, lineterminator="\n"))
    return out.getvalue()


def page(title: str, results: Sequence[tuple[Found, Sequence[Plot]]], command: str) -> str:
    """HTML that fetches nothing; light and dark."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    sections: list[dict[str, Any]] = [
        {
            "comparison": found.comparison,
            "verdict": verdict(found),
            "budget": budget(found),
            "header": header(found),
            "rows": marked(found),
            "notes": (*found.comparison.notes, *terms(found)),
            "plots": plots,
        }
        for found, plots in results
    ]
    return template.render(title=title, command=command, terms=TERMS, sections=sections) + "\n"

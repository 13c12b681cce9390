"""A comparison for people: its table as cells, Markdown and one HTML page (page.html) with everything in it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare.config import Metric
from open_clip_ov2.compare.plan import best_rate
from open_clip_ov2.compare.plots import answer_plots, plots
from open_clip_ov2.compare.results import Found, VariantResult, best, labelled, summary
from open_clip_ov2.recipe.counts import short_count
from open_clip_ov2.tracking.text_table import markdown

NONE = "–"
# What holds for all comparisons.
TERMS = (
    "Within a comparison every variant has the same images and captions, in the order and with the crops that a seed "
    "gives. What else differs, besides model, resolution and samples, is listed under the table.",
    "ov2 is trained by this package's step, CLIP and CoCa exactly as stock OpenCLIP trains them.",
    "Images/s are measured before training by short runs in turns, with nothing beside them: the median and the range. "
    "Ratios are taken within each repetition. Seconds are samples divided by these images/s.",
    "Step memory is the peak of a step above weights, gradients and optimizer state, at the batch size of training.",
    "Learning curves and final values are of held-out images; ± is the standard deviation over seeds (n - 1). Bold: "
    "better than all others with every seed.",
    "An answer's interval is a bootstrap over images and seeds: 4,000 draws, in each the same images for both, "
    "and seeds for each of them, whose spread is widened to what so few seeds leave unknown (compare/answers.py). The "
    "answer is 'cannot tell' where 0 lies in the 95% interval: one of twenty questions seems to have a difference "
    "though there is none.",
)


class Cell(NamedTuple):
    """`best`: its variant is better than all others with every seed."""

    text: str
    best: bool = False


def table(found: Found, brief: bool = False) -> list[list[Cell]]:
    """The header, and a row for each variant and baseline. A column in which none has anything is left out; `brief`
    leaves out memory and times too."""
    winners, metrics = best(found), found.comparison.metrics
    costs = (f"× {found.comparison.reference}", "step memory, MiB", "largest batch")
    fixed = ("", "images/s", *costs, "samples", "training, s")
    titles = (f"{labelled(metric)} {'↑' if metric.better == 'higher' else '↓'}" for metric in metrics)
    rows = [[Cell(title) for title in (*fixed, *titles)]]
    for one in found.variants:
        texts = [one.name, spread(one.rates, 0), spread(one.ratios, 2)]
        texts += [_number(one.cost.step_memory_mb), _number(one.cost.largest_batch)]
        texts += [short_count(one.samples), _number(one.seconds)] if one.trained else [NONE, NONE]
        cells = [Cell(mean_and_sd(metric, one), winners.get(metric.key) == one.name) for metric in metrics]
        rows.append([*map(Cell, texts), *cells])
    for name, known in found.baselines.items():
        texts = [f"{one.scale * known[one.key]:.{one.digits}f}" if one.key in known else NONE for one in metrics]
        rows.append([*map(Cell, (name, *(NONE for _ in fixed[1:]), *texts))])
    columns = [column for column in zip(*rows, strict=True) if any(cell.text != NONE for cell in column[1:])]
    if brief:
        columns = [column for column in columns if column[0].text not in (*costs, fixed[-1])]
    return [list(row) for row in zip(*columns, strict=True)]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the least and the greatest in brackets."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def mean_and_sd(metric: Metric, variant: VariantResult) -> str:
    """Mean ± standard deviation over seeds."""
    values = variant.shown(metric)
    if not values:
        return NONE
    total = summary(values)
    text = f"{total.mean:.{metric.digits}f}"
    return text if total.sd is None else f"{text} ± {total.sd:.{metric.digits}f}"


def with_bold(cells: list[list[Cell]]) -> str:
    """In Markdown."""
    return markdown([[f"**{cell.text}**" if cell.best else cell.text for cell in row] for row in cells])


def budget(found: Found) -> str:
    """What was equal, in a sentence."""
    comparison = found.comparison
    seeds = {seed for variant in found.trained for seed in variant.seeds}
    each = {
        "samples": f"{comparison.budget:,.0f} samples each",
        "seconds": f"{comparison.budget:,.0f} seconds each: as many samples as a variant's images/s make of them",
        "flops": f"As many FLOPs each as {comparison.reference} needs for {comparison.budget:,.0f} samples",
    }[comparison.mode]
    counted = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    return f"{each}; {counted}. Speeds: {found.machine}."


def notes(found: Found) -> list[str]:
    """The file's notes, what variants have in common and what not, and what their memory was measured with."""
    comparison, measure = found.comparison, found.comparison.measure
    out = [*comparison.notes, f"Flags of all variants: {shlex.join(to_argv(comparison.flags))}."]
    for one in found.variants:
        if one.unlike:
            out.append(f"{one.name} has, and {comparison.reference} in brackets: {'; '.join(one.unlike)}.")
    searched = {name: rates for name, rates in found.searched.items() if len(rates) > 2}
    if ends := [name for name, rates in searched.items() if best_rate(rates) in (min(rates), max(rates))]:
        out.append(
            f"A better learning rate may lie beyond those searched, an end of which was best: {', '.join(ends)}."
        )
    if any(one.cost.step_memory_mb is not None for one in found.variants):
        lengths = measure.lengths
        captions = f"captions of {lengths.low} to {lengths.high} tokens, {lengths.mean:g} on average"
        limit = "" if measure.memory_limit_gb is None else f" under {measure.memory_limit_gb:g} GB, weights included"
        batch = f"; largest batch: by bisection to 8 images{limit}" if measure.largest_batch else ""
        out.append(f"Memory: noise at the resolution of the last stage, {captions}{batch}.")
    return out


def results_md(title: str, found: Sequence[Found], command: str) -> str:
    terms = "\n".join(f"- {term}" for term in TERMS)
    answered = "\n".join(f"- {answer.sentence}" for one in found for answer in one.answers)
    blocks = [f"# {title}", answered, terms, f"```bash\n{command}\n```"]
    for one in found:
        blocks += [f"## {one.comparison.title}", one.comparison.about, budget(one)]
        blocks += [*map(with_bold, tables(one)), *notes(one)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def summary_md(found: Sequence[Found]) -> str:
    """For other documents: of each comparison its title, its brief table and its answers."""
    blocks = []
    for one in found:
        answered = "\n".join(f"- {answer.brief}" for answer in one.answers)
        blocks += [f"### {one.comparison.title}", with_bold(table(one, brief=True)), answered]
    return "\n\n".join(filter(None, blocks)) + "\n"


def tables(found: Found) -> list[list[list[Cell]]]:
    return [table(found), *([search_table(found)] if found.searched else [])]


def search_table(found: Found) -> list[list[Cell]]:
    """Loss of each variant at each learning rate of the search; the one that was taken is the best."""
    rates = sorted({lr for by_rate in found.searched.values() for lr in by_rate})
    rows = [[Cell("learning rate, searched"), *(Cell(f"{lr:g}") for lr in rates)]]
    for name, by_rate in found.searched.items():
        best = best_rate(by_rate)
        rows.append([Cell(name), *(Cell(f"{by_rate[lr]:.3f}" if lr in by_rate else NONE, lr == best) for lr in rates)])
    return rows


def page(title: str, results: Sequence[Found], command: str) -> str:
    """HTML that fetches nothing; light and dark."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    said = {"budget": budget, "tables": tables, "notes": notes, "plots": plots, "answer_plots": answer_plots}
    return template.render(title=title, command=command, terms=TERMS, results=results, **said) + "\n"

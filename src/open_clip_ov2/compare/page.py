"""One HTML page with everything in it: no script, no font, no picture from anywhere else; light and dark."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare import tables
from open_clip_ov2.compare.plots import Plot
from open_clip_ov2.compare.results import Found

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d9dee3; --best: #e8f2ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa4ae; --paper: #14171a; --line: #343a41; --best: #1e3226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p, li { max-width: 44rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .4rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
td.best { background: var(--best); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure.large { grid-column: 1 / -1; max-width: 60rem; }
figure svg { height: auto; max-width: 100%; display: block; }
code { font: .85rem/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { padding: .75rem 1rem; border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap; }
"""


# What holds for all comparisons.
TERMS = (
    "Within a comparison every arm has the same pictures and captions, in the order and with the crops that a seed "
    "gives. What else differs, beside model, resolution and samples, stands under the table.",
    "ov2 is trained by this package's step, CLIP and CoCa exactly as stock OpenCLIP trains them; here that is a part "
    "of the difference in speed and memory.",
    "Images/s are measured before training: short runs of the arms in turn, nothing beside them; the median and the "
    "range. Ratios are taken within each repetition. Seconds are samples over these images/s, since the clock of runs "
    "trained side by side, or on a busy machine, says little.",
    "Step memory is the peak of a step above weights, gradients and optimizer state, by the allocator's count, at the "
    "batch trained with.",
    "Learning curves and final figures are of held-out pictures; ± is the standard deviation of seeds (n - 1). In bold "
    "is what is better than all others with every seed.",
)


def page(title: str, results: Sequence[tuple[Found, Sequence[Plot]]], command: str) -> str:
    parts = [_section(found, plots) for found, plots in results]
    listed = "".join(f"<li>{escape(term)}</li>" for term in TERMS)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<ul>{listed}</ul>\n<pre><code>{escape(command)}</code></pre>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(found: Found, plots: Sequence[Plot]) -> str:
    comparison = found.comparison
    figures = "\n".join(_figure(plot) for plot in plots)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in (*comparison.notes, *terms(found)))
    return (
        f'<section id="{escape(comparison.name)}">\n<h2>{escape(comparison.title)}</h2>\n'
        f'<p>{escape(comparison.about)}</p>\n<p class="soft">{escape(budget(found))}</p>\n'
        f'<div class="wide">{_table(found)}</div>\n{notes}\n<div class="plots">\n{figures}\n</div>\n</section>'
    )


def budget(found: Found) -> str:
    """What was equal, in a sentence."""
    comparison = found.comparison
    seeds = sorted({seed for arm in found.trained for seed in arm.seeds})
    each = {
        "samples": f"{comparison.budget:,.0f} samples each",
        "seconds": f"{comparison.budget:,.0f} seconds each: as many samples as an arm's measured images/s make of them",
        "flops": f"as many FLOPs each as {comparison.reference} needs for {comparison.budget:,.0f} samples",
    }[comparison.mode]
    counted = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    return f"{each[0].upper()}{each[1:]}; {counted}. Speeds: {found.machine}."


def terms(found: Found) -> list[str]:
    """What this comparison's arms have alike, what not, and what their memory was measured with."""
    comparison, measure = found.comparison, found.comparison.measure
    out = [f"Flags of all arms: {shlex.join(to_argv(comparison.flags))}."]
    out += [
        f"{arm.name} has, and {comparison.reference} in brackets: {'; '.join(arm.unlike)}."
        for arm in found.arms
        if arm.unlike
    ]
    if any(arm.cost.step_memory_mb is not None for arm in found.arms):
        lengths = measure.lengths
        captions = f"captions of {lengths.low} to {lengths.high} tokens, {lengths.mean:g} on average"
        limit = "" if measure.memory_limit_gb is None else f" under {measure.memory_limit_gb:g} GB, weights included"
        batch = f"; largest batch: by bisection to 8 images{limit}" if measure.largest_batch else ""
        out.append(f"Memory: noise at the resolution of the last stage, {captions}{batch}.")
    return out


def _figure(plot: Plot) -> str:
    large = ' class="large"' if plot.wide else ""
    return (
        f'<figure id="{escape(plot.name)}"{large} role="group" aria-label="{escape(plot.caption)}">\n{plot.svg}\n'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _table(found: Found) -> str:
    winners = tables.best(found)
    keys = [metric.key for metric in found.comparison.metrics]
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in tables.header(found))
    body = []
    for arm, cells in zip(found.arms, tables.rows(found), strict=True):
        fixed = len(cells) - len(keys)
        marks = [""] * fixed + [' class="best"' if winners.get(key) == arm.name else "" for key in keys]
        body.append(
            "<tr>"
            + "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
            + "</tr>"
        )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{''.join(body)}</tbody>\n</table>"

"""`ov2 compare`: models trained and evaluated on equal terms; one table, one page with plots."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.cluster_flags import split
from open_clip_ov2.errors import UserError

WIDTH = 160  # of what goes to a file


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    from open_clip_ov2.compare import study, tables
    from open_clip_ov2.compare.plan import Data, Study
    from open_clip_ov2.compare.reader import BATCH, SET_BY_US, load_comparison

    comparisons = [study.as_asked(load_comparison(path), args.seeds, args.scale) for path in args.files]
    names = [comparison.name for comparison in comparisons]
    if len(set(names)) < len(names):
        raise UserError(f"two comparisons are called {next(n for n in names if names.count(n) > 1)}: rename a file")
    taken = [word for word in after if word.split("=")[0].removeprefix("--") in (*SET_BY_US, *BATCH)]
    if taken:
        raise UserError(f"{taken[0]} after `--`: the comparison's file or ov2 compare itself says that")
    data = Data(args.train_data, args.val_data, args.probe_data or args.train_data, tuple(after))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    whole = Study(
        comparisons=tuple(comparisons),
        data=data,
        folder=args.out,
        logs=args.logs or args.out / "runs",
        at_once=args.jobs,
        command=shlex.join(["ov2", "compare", *argv]),
        title=args.title or (comparisons[0].title if len(comparisons) == 1 else "Models on equal terms"),
    )
    for found in study.carry_out(whole, lambda text: console.print(escape(text), highlight=False)):
        arms = tables.rows(found)  # as columns: there are fewer of them than of figures
        title = escape(found.comparison.title)
        table = Table("", *(escape(cells[0]) for cells in arms), box=None, pad_edge=False, title=title)
        for place, name in enumerate(tables.header(found)[1:], 1):
            table.add_row(escape(name), *(escape(cells[place]) for cells in arms))
        console.print(table)
    console.print(f"page: {args.out / 'index.html'} (results.md, results.csv and results.json beside it)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 compare",
        usage="ov2 compare FILE.toml... --train-data SHARDS --val-data SHARDS [flags] [-- FLAGS OF OV2 TRAIN]",
        description="Train and evaluate models on equal terms. The same command goes on where it was stopped, and "
        "reads what is done. Flags after `--` are for all runs.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE.toml", help="comparisons; one page for all of them")
    add("--train-data", required=True, metavar="SHARDS", help="as for ov2 train")
    add("--val-data", required=True, metavar="SHARDS", help="held out: validation and evaluations")
    add("--probe-data", metavar="SHARDS", help="what probes are fitted to (default: --train-data)")
    add("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare")
    add("--logs", type=Path, metavar="FOLDER", help="where runs lie (default: OUT/runs)")
    add("--title", metavar="TEXT", help="of the page")
    add("--jobs", type=_jobs, default=1, metavar="N", help="runs side by side, which share the cores (default: 1)")
    add("--seeds", type=_seeds, metavar="S,S,...", help="instead of the files'")
    add("--scale", type=_scale, default=1.0, metavar="F", help="times the files' samples or seconds, to try things out")
    return parser


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isdigit() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: different whole numbers, separated by commas")
    return [int(seed) for seed in seeds]

"""`ov2 compare`: models trained and evaluated on equal terms; one table, one page with plots."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from open_clip_ov2.argv import Parser, flag_type, last, split
from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import comma_separated, real, whole
from open_clip_ov2.tracking.text_table import on_console

WIDTH = 160  # of what goes to a file


def main(argv: Sequence[str]) -> None:
    before, after = split(argv)
    args = _parser().parse_args(before)
    from open_clip_ov2.compare import page, study
    from open_clip_ov2.compare.config import BATCH, SET_BY_US, load_comparison
    from open_clip_ov2.compare.plan import Study

    comparisons = [load_comparison(path).scaled(args.seeds, args.scale) for path in args.files]
    names = [comparison.name for comparison in comparisons]
    if len(set(names)) < len(names):
        raise UserError(f"two comparisons are called {next(n for n in names if names.count(n) > 1)}: rename a file")
    places = (last(after, f"--{name}") for name in (*SET_BY_US, *BATCH))
    taken = [after[place] for place in places if place >= 0]
    if taken:
        raise UserError(f"{taken[0]} after `--`: the comparison's file or `ov2 compare` sets it")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    whole_study = Study(
        comparisons=tuple(comparisons),
        train=args.train_data,
        val=args.val_data,
        probe=args.probe_data or args.train_data,
        more=tuple(after),
        folder=args.out,
        logs=args.logs or args.out / "runs",
        at_once=args.jobs,
        command=shlex.join(["ov2", "compare", *argv]),
        title=args.title or (comparisons[0].title if len(comparisons) == 1 else "Models on equal terms"),
    )
    for found in study.carry_out(whole_study, lambda text: console.print(escape(text), highlight=False)):
        # Variants as columns: there are fewer of them than of numbers.
        rows = [[cell.text for cell in column] for column in zip(*page.table(found), strict=True)]
        console.print(on_console(rows, box=None, pad_edge=False, title=escape(found.comparison.title)))
        for answer in found.answers:
            console.print(escape(answer.sentence), highlight=False)
    console.print(f"page: {args.out / 'index.html'} (results.md, results.csv and results.json beside it)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 compare",
        usage="ov2 compare FILE.toml... --train-data SHARDS --val-data SHARDS [flags] [-- FLAGS OF OV2 TRAIN]",
        description="Train and evaluate models on equal terms. The same command continues where it was stopped and "
        "reuses what is done. Flags after `--` are for all runs.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE.toml", help="comparisons; one page for all of them")
    add("--train-data", required=True, metavar="SHARDS", help="as for ov2 train")
    add("--val-data", required=True, metavar="SHARDS", help="held out: validation and evaluations")
    add("--probe-data", metavar="SHARDS", help="what probes are fitted to (default: --train-data)")
    add("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare")
    add("--logs", type=Path, metavar="FOLDER", help="where the runs are (default: OUT/runs)")
    add("--title", metavar="TEXT", help="of the page")
    add("--jobs", type=flag_type(whole(1)), default=1, metavar="N", help="runs at once, which share the cores")
    add("--seeds", type=flag_type(comma_separated(whole(0))), metavar="S,S,...", help="instead of the files'")
    scale = flag_type(real(0, above=True))
    add("--scale", type=scale, default=1.0, metavar="F", help="times the files' samples or seconds, to try things out")
    return parser

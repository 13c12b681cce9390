"""`ov2 plot`: training and validation curves of one or more runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.commands.options import Parser


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    from open_clip_ov2.runlog.curves import plot_curves

    plot_curves(args.runs, args.out, metric=args.metric)
    print(f"curves: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 plot", description="Draw the curves of one or more runs as a PNG.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--metric", default="caption_loss", help="a name in results.jsonl (default: %(default)s)")
    return parser

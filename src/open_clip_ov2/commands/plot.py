"""`ov2 plot`: training and validation curves of one or more runs, or robustness curves of their evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError


def main(argv: Sequence[str]) -> None:
    from open_clip_ov2.tracking.figures import plot_curves, plot_robustness

    args = _parser().parse_args(argv)
    if not args.robustness:
        plot_curves(args.runs, args.out, metric=args.metric or "caption_loss")
    elif args.metric:
        raise UserError("--metric and --robustness draw different curves; leave one of the two out")
    else:
        plot_robustness(args.runs, args.out)
    print(f"wrote {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 plot", description="Draw curves of one or more runs as an image.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="or .svg, .pdf")
    parser.add_argument("--metric", help="a metric in results.jsonl (default: caption_loss)")
    parser.add_argument(
        "--robustness", action="store_true",
        help="draw the tasks keep-ratios and image-sizes instead; RUN may also be a file of `ov2 eval --out`",
    )  # fmt: skip
    return parser

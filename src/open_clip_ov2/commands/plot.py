"""`ov2 plot`: training and validation curves of one or more runs, or the robustness curves of their evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.robustness:
        if args.metric:
            raise UserError(
                "--metric: --robustness draws the curves that the evaluations have; leave one of the two out"
            )
        from open_clip_ov2.tracking.figures import plot_robustness

        plot_robustness(args.runs, args.out)
    else:
        from open_clip_ov2.tracking.figures import plot_curves

        plot_curves(args.runs, args.out, metric=args.metric or "caption_loss")
    print(f"curves: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 plot", description="Draw the curves of one or more runs as a PNG.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--metric", help="a name in results.jsonl (default: caption_loss)")
    parser.add_argument(
        "--robustness", action="store_true",
        help="instead: the tasks keep-ratios and image-sizes, from RUN/eval.json or files of `ov2 eval --out`",
    )  # fmt: skip
    return parser

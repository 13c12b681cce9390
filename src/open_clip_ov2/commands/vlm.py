"""`ov2 vlm`: a multimodal model on an encoder, trained by LLaVA's recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2 import vlm
from open_clip_ov2.argv import Parser, add_flags, flag_values
from open_clip_ov2.commands.options import add_device, paths_checked
from open_clip_ov2.errors import unknown_key
from open_clip_ov2.files import write_text
from open_clip_ov2.tracking.text_table import markdown
from open_clip_ov2.vlm import vlm_options, vlm_plan
from open_clip_ov2.vlm.benchmarks import score_table, vlm_eval

COMPARE = (
    "The papers' table of scores: rows are encoders, columns benchmarks. Published rows come last, with their source."
)


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    with paths_checked():
        args.run(args, list(argv[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 vlm", description="A multimodal model on an encoder, by LLaVA's recipes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    train = commands.add_parser("train", help="train one", description=vlm_options.DESCRIPTION)
    vlm_options.add_train_flags(train)
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("eval", help="ask one questions", description=vlm_eval.DESCRIPTION)
    what = "a run of ov2 vlm train, or an exported LLaVA"
    evaluate.add_argument("model", metavar="MODEL", type=Path, help=what)
    add_flags(evaluate, vlm_eval.VlmEvalOptions)
    add_device(evaluate)
    evaluate.set_defaults(run=_eval)
    compare = commands.add_parser("compare", help="the papers' table", description=COMPARE)
    compare.add_argument("models", metavar="MODEL", nargs="*", type=Path, help="folders that ov2 vlm eval has scored")
    compare.add_argument("--recipe", metavar="NAME", help="published rows of one recipe alone")
    compare.add_argument("--out", metavar="FILE.md", type=Path, help="write the table in Markdown too")
    compare.set_defaults(run=_compare)
    return parser


def _train(args: argparse.Namespace, argv: list[str]) -> None:
    plan = vlm_options.plan_of(args, argv, needs_data=not args.dry_run)
    if args.dry_run:
        print("\n".join(vlm_plan.described(plan)))
    else:
        vlm.train(plan)


def _eval(args: argparse.Namespace, argv: list[str]) -> None:
    options = vlm_eval.VlmEvalOptions(**flag_values(vlm_eval.VlmEvalOptions, args))
    vlm_eval.evaluate(args.model, options, args.device)


def _compare(args: argparse.Namespace, argv: list[str]) -> None:
    published = score_table.published_rows()
    recipes = dict.fromkeys(row.recipe for row in published)
    if args.recipe is not None and args.recipe not in recipes:
        raise unknown_key("--recipe", args.recipe, recipes, "recipe with published rows")
    own = [row for model in args.models for row in score_table.own_rows(model)]
    rows = score_table.table([*own, *(row for row in published if args.recipe in (None, row.recipe))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    if args.out is not None:
        write_text(args.out, f"{markdown(rows)}\n")

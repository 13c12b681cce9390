"""`ov2 vlm`: a multimodal model on an encoder, trained by LLaVA's recipes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from open_clip_ov2 import vlm
from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import paths_checked
from open_clip_ov2.vlm import vlm_options, vlm_plan


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
    return parser


def _train(args: argparse.Namespace, argv: list[str]) -> None:
    plan = vlm_options.plan_of(args, argv, needs_data=not args.dry_run)
    if args.dry_run:
        print("\n".join(vlm_plan.described(plan)))
    else:
        vlm.train(plan)

"""`ov2 export`: a trained encoder in the format of another library. formats/targets.py lists the formats."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import paths_checked
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.targets import TARGETS


def main(argv: Sequence[str]) -> None:
    args = vars(_parser().parse_args(argv))
    source, to = args.pop("run"), args.pop("to")
    if sides := args.get("image_size"):
        if len(sides) > 2:
            raise UserError(f"--image-size: {len(sides)} numbers; expected 1 or 2")
        args["image_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    _check_target(args, to)
    with paths_checked():
        folder, lines = training.export(source, to, **args)
    print("\n".join([*lines, f"{to}: {folder}"]))


def _parser() -> argparse.ArgumentParser:
    targets = "\n".join(f"  {target.name:<10}{target.summary}" for target in TARGETS.values())
    parser = Parser(
        prog="ov2 export",
        description=f"Write a trained encoder for another library.\n\ntargets:\n{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the namespace
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, a .pt of it, a model folder, hf-hub: or NAME:TAG")
    add("--to", required=True, choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    add("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export/TARGET)")
    size = "export for this resolution, or this height and width (default: the model's)"
    add("--image-size", type=int, nargs="+", metavar="N", help=size)
    fit = "how to fit a released encoder's table to --image-size (default: interpolate; ov2 models recompute)"
    add("--position-table", choices=("interpolate", "recompute"), help=fit)
    add_card_flags(parser)
    for target in TARGETS.values():
        group = parser.add_argument_group(f"--to {target.name}")
        for flag, keywords in target.options.items():
            group.add_argument(flag, **keywords)
    return parser


def add_card_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model card")
    group.add_argument("--license", "--licence", metavar="ID", help="such as apache-2.0")
    group.add_argument("--dataset", metavar="NAME", help="default: the names of the shards")


def _check_target(given: dict[str, Any], to: str) -> None:
    """Raises UserError for a flag of another target."""
    for target in TARGETS.values():
        for flag in target.options:
            if flag.removeprefix("--").replace("-", "_") in given and target.name != to:
                raise UserError(f"{flag} is for --to {target.name}, and this is --to {to}")

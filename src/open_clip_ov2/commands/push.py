"""`ov2 push`: upload a model to the Hugging Face hub, with a card filled from its run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.export import add_card_flags
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.targets import PUSHABLE


def main(argv: Sequence[str]) -> None:
    args = vars(_parser().parse_args(argv))
    source, repository = args.pop("run"), args.pop("repository")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise UserError(f"{repository!r}: not the name of a repository, which is ORG/NAME")
    print("\n".join(training.push(source, repository, **args)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 push", description="Put a model on the Hugging Face hub.")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder or checkpoint, or a model folder")
    add("repository", metavar="ORG/NAME", help="the repository on the hub")
    add("--to", choices=PUSHABLE, default="ov2", help="a format of ov2 export (default: %(default)s)")
    add("--image-size", type=int, metavar="N", help="for this resolution (default: the model's)")
    add("--private", action="store_true", help="make a new repository private")
    add("--dry-run", type=Path, metavar="FOLDER", help="write what would be pushed there, and stop")
    add_card_flags(parser)
    return parser

"""`ov2 captions`: captions beside tars. One module for each subcommand, which adds its parser with `add_parser`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from open_clip_ov2.argv import Parser

SUBCOMMANDS = ("join", "write", "filter", "report")


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    args.run(args)


def _parser() -> Parser:
    parser = Parser(
        prog="ov2 captions",
        description="Captions beside tars: a caption set is a folder with one NAME.jsonl.gz for each NAME.tar, and the "
        "tars stay as they are. --captions NAME=FOLDER of `ov2 train`, eval, caption, bench data and shards resize "
        "reads it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name in SUBCOMMANDS:  # each sets the default `run`, a function of the parsed flags
        import_module(f"{__name__}.{name}").add_parser(commands)
    return parser

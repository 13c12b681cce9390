"""The `ov2` command: one module of `open_clip_ov2.commands` for each subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from open_clip_ov2.errors import UserError

COMMANDS = {
    "train": "train a model with OpenCLIP's flags and ours",
    "eval": "held-out caption loss, the same with shuffled pictures, exact captions by kind",
    "caption": "caption pictures with a trained model",
    "plot": "draw the curves of one or more runs",
}


def usage() -> str:
    rows = "\n".join(f"  ov2 {name:<10}{text}" for name, text in COMMANDS.items())
    return f"usage: ov2 COMMAND ...   (ov2 COMMAND --help says more)\n\n{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's, told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"{name!r} is no command of ov2 (there are: {', '.join(COMMANDS)})")
        import_module(f"open_clip_ov2.commands.{name}").main(rest)
    except UserError as error:
        print(f"ov2: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ov2: interrupted", file=sys.stderr)
        return 130
    return 0

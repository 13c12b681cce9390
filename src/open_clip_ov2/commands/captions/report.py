"""`ov2 captions report`: what is in a caption set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import add_flags, flag_values
from open_clip_ov2.captions.caption_report import PAGE, ReportOptions, run


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="lengths, repetition, refusals, agreement with alt-texts, samples with pictures, as one page",
        description=f"Show what is in a caption set, and write FOLDER/{PAGE}, which needs no other file.",
    )
    parser.add_argument("captions", type=Path, metavar="FOLDER", help="the caption set")
    add_flags(parser, ReportOptions)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    table = run(args.captions, ReportOptions(**flag_values(ReportOptions, args)))
    width = max(len(label) for label, _ in table)
    for label, value in table:
        print(f"{label:<{width}}  {value}")
    print(f"page: {args.captions / PAGE}")

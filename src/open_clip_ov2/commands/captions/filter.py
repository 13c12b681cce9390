"""`ov2 captions filter`: a caption set without the captions that break a rule."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import add_flags, flag_values
from open_clip_ov2.captions.filter import run
from open_clip_ov2.captions.filter_options import FilterOptions


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "filter",
        help="drop captions by length, repetition, refusals, language, duplicates, scores, lists of uids",
        description="Write a caption set with the lines of another one, some of them dropped, with the rule that "
        "they break. If the command is stopped, the same command continues.",
    )
    parser.add_argument("captions", type=Path, metavar="FOLDER", help="the caption set")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the new caption set")
    add_flags(parser, FilterOptions)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(format="ov2: %(message)s")
    found = run(args.captions, args.out, FilterOptions(**flag_values(FilterOptions, args)))
    total = max(1, found.total())
    print(f"{args.out}: {found.total():,} lines")
    for verdict, count in found.most_common():
        print(f"  {verdict:<16}{count:>12,}  {100 * count / total:5.1f}%")

"""`ov2 captions join`: published captions beside the tars of img2dataset and DataComp."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import flag_type
from open_clip_ov2.captions.join import AUTO, BLANK, FOUND, NOT_FOUND, Join, chosen_id
from open_clip_ov2.captions.published import IDS, Tables, connect
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.tables import one_of, real, whole

NAMED = 3  # files that are named here; join.json has them all


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "join",
        help="find the captions of tars in published tables",
        description="Find the captions of tars in published tables (parquet), such as ReCap-DataComp-1B's, and write "
        "them beside the tars. Tables and tars may be larger than memory. If the command is stopped, the same command "
        "continues.",
    )
    add = parser.add_argument
    add("shards", nargs="+", metavar="TARS", help="as for ov2 train --train-data: braces, ::, s3://, pipe:")
    add("--captions", nargs="+", required=True, metavar="FILES", help="parquet files: 'recap/*.parquet', s3:// too")
    add("--column", required=True, metavar="NAME", help="column of the captions")
    add("--out", required=True, type=Path, metavar="FOLDER", help="the caption set")
    add("--on", type=flag_type(one_of(AUTO, *IDS)), default=AUTO, metavar="|".join((AUTO, *IDS)),
        help="what samples and rows share; auto: what finds most of the first tar (default: %(default)s)")  # fmt: skip
    add("--also", nargs="+", default=[], metavar="NAME", help="keep these columns too, such as re_clip_score")
    add("--unescape", action="store_true", help=r"write \xc2\xae in captions as the sign that these bytes mean")
    add("--memory-gb", type=flag_type(real(0, above=True)), default=4.0, metavar="GB",
        help="memory of the database; beyond it the disk is used (default: %(default)s)")  # fmt: skip
    add("--workers", type=flag_type(whole(1)), default=1, metavar="N", help="processes that read tars (default: 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    urls, _ = expand_shards("::".join(args.shards))
    say = partial(print, file=sys.stderr, flush=True)
    tables = Tables(args.captions, args.column, args.also, connect(args.memory_gb, args.workers))
    if tables.lacking:
        named = ", ".join(tables.lacking[:NAMED]) + (", ..." if len(tables.lacking) > NAMED else "")
        say(f"{len(tables.lacking)} of {len(tables.columns)} files lack the column {args.column}: {named}")
    on = chosen_id(args.on, args.out, urls, tables, say)
    report = Join(urls, tables, on, args.out, args.unescape, say).run(args.workers)
    samples = report["samples"]
    print(f"{args.out}: {len(urls):,} tars, {samples:,} samples, joined on {on}")
    for what in (FOUND, NOT_FOUND, BLANK, f"no {on} in the tar"):
        if report.get(what):
            print(f"{report[what]:>13,}  {report[what] / samples:6.1%}  {what}")

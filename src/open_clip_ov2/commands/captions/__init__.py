"""`ov2 captions`: captions beside tars."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser, add_flags, flag_type, flag_values
from open_clip_ov2.captions.caption_report import PAGE, ReportOptions, write_report
from open_clip_ov2.captions.filter import filter_set
from open_clip_ov2.captions.filter_options import FilterOptions
from open_clip_ov2.captions.join import AUTO, BLANK, FOUND, NOT_FOUND, Join, chosen_id
from open_clip_ov2.captions.published import IDS, Tables, connect
from open_clip_ov2.captions.write_options import add_write_flags, parsed_write, write_set
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.tables import one_of, real, whole

NAMED = 3  # files that are named here; join.json has them all


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
    _add_join(commands)
    write = commands.add_parser(
        "write",
        help="write captions with a model: one of ours, one of the hub, or vLLM",
        description="Write a caption of each picture of many tars, which stay as they are. If the command is stopped, "
        "the same command continues; in a SLURM array or under torchrun each process has its own shards.",
    )
    add_write_flags(write)
    write.set_defaults(run=lambda args: print(write_set(parsed_write(args))))
    keep = commands.add_parser(
        "filter",
        help="drop captions by length, repetition, refusals, language, duplicates, scores, lists of uids",
        description="Write a caption set with the lines of another one, some of them dropped, with the rule that "
        "they break. If the command is stopped, the same command continues.",
    )
    keep.add_argument("captions", type=Path, metavar="FOLDER", help="the caption set")
    keep.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the new caption set")
    add_flags(keep, FilterOptions)
    keep.set_defaults(run=_filter)
    report = commands.add_parser(
        "report",
        help="lengths, repetition, refusals, agreement with alt-texts, samples with pictures, as one page",
        description=f"Show what is in a caption set, and write FOLDER/{PAGE}, which needs no other file.",
    )
    report.add_argument("captions", type=Path, metavar="FOLDER", help="the caption set")
    add_flags(report, ReportOptions)
    report.set_defaults(run=_report)
    return parser


def _add_join(commands: Any) -> None:
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
    parser.set_defaults(run=_join)


def _join(args: argparse.Namespace) -> None:
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


def _filter(args: argparse.Namespace) -> None:
    logging.basicConfig(format="ov2: %(message)s")
    found = filter_set(args.captions, args.out, FilterOptions(**flag_values(FilterOptions, args)))
    total = max(1, found.total())
    print(f"{args.out}: {found.total():,} lines")
    for verdict, count in found.most_common():
        print(f"  {verdict:<16}{count:>12,}  {100 * count / total:5.1f}%")


def _report(args: argparse.Namespace) -> None:
    options = ReportOptions(**flag_values(ReportOptions, args))
    table = write_report(args.captions, options)
    width = max(len(label) for label, _ in table)
    for label, value in table:
        print(f"{label:<{width}}  {value}")
    print(f"page: {args.captions / PAGE}")

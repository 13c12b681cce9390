"""`ov2 shards resize`: low-resolution copies of shards, so that large JPEGs do not slow down a first stage."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from open_clip_ov2.argv import Parser, flag_type
from open_clip_ov2.commands.options import add_captions
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.resize import LEDGER, Resize, ShardReport, Shrink
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.data.sidecars import caption_sets
from open_clip_ov2.data.skips import describe
from open_clip_ov2.tables import whole

SHOWN = 5  # dropped samples that are named here; the ledger has them all
SHORT_SIDE = 160  # the largest crop of an 84 px stage then has 1.9 times its resolution, the least (40% of area) 1.2
QUALITY = 90  # 11 KB for a picture of 160 px (scripts/loader_bench.py)


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    urls, _ = expand_shards("::".join(args.shards))
    console = Console(markup=False, highlight=False, soft_wrap=True)  # file names are not markup
    shrink = Shrink(args.short_side, args.quality, args.max_image_pixels)
    with Resize(urls, args.out, shrink, caption_sets(args.captions or ())) as resize:
        _run(resize, args.workers, console)
        sizes = resize.finish()
        _report(list(resize.reports.values()), sum(sizes.values()), args.out, console)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 shards", description="Work on webdataset shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    resize = commands.add_parser(
        "resize",
        help="copy shards with smaller images; keys, captions and everything else stay as they are",
        description="Copy shards with smaller images. Keys, captions and all other entries are copied byte for byte; "
        "nothing is enlarged; EXIF orientation is applied; samples whose image cannot be decoded are left out and "
        "named. If the command is stopped, the same command continues.",
    )
    add, default = resize.add_argument, "default: %(default)s"
    add("shards", nargs="+", metavar="IN", help="tars, as for ov2 train --train-data: braces, ::, pipe:")
    add("out", type=Path, metavar="OUT", help="folder for the copies; it must not hold other files")
    add("--short-side", type=flag_type(whole(1, 1 << 16)), default=SHORT_SIDE, metavar="PX", help=default)
    add("--quality", type=flag_type(whole(1, 95)), default=QUALITY, metavar="Q", help="of JPEG and WebP, 1 to 95")
    add("--workers", type=flag_type(whole(1, 1 << 10)), default=1, metavar="N", help="processes, a shard each")
    add_captions(resize, "copy these captions too, to OUT/NAME, without the lines of samples that are left out")
    add("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, metavar="N", help=default)
    return parser


def _run(resize: Resize, workers: int, console: Console) -> None:
    done = len(resize.reports)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
               TextColumn("{task.fields[samples]:,} samples"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        total, samples = done + len(resize.left), sum(report.samples_out for report in resize.reports.values())
        task = progress.add_task("resizing", total=total, completed=done, samples=samples)
        for report in resize.run(workers):
            samples += report.samples_out
            progress.update(task, advance=1, samples=samples)
            if report.broken:
                progress.console.print(f"warning: {report.source} is broken ({report.broken}): not all of it was read")


def _report(reports: list[ShardReport], samples: int, out: Path, console: Console) -> None:
    dropped = [row for report in reports for row in report.dropped]
    size = sum(report.bytes_out for report in reports)
    console.print(f"{out}: {len(reports)} shards, {samples:,} samples, {size / 1e6:,.1f} MB")
    if dropped:
        causes = describe(Counter(cause for _, cause, _ in dropped))
        named = ", ".join(key for key, _, _ in dropped[:SHOWN]) + (", ..." if len(dropped) > SHOWN else "")
        console.print(f"left out: {causes}: {named} (all of them: {out / LEDGER})")
    read = sum(report.samples_in for report in reports)
    console.print(f"{read:,} read = {samples:,} written + {len(dropped):,} left out")

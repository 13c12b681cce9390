"""`ov2 captions write`: a caption of each picture of many tars, by a model."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import add_flags, flag_values
from open_clip_ov2.captions.write_options import WriteOptions, run
from open_clip_ov2.data.shards import expand_shards


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "write",
        help="write captions with a model: one of ours, one of the hub, or vLLM",
        description="Write a caption of each picture of many tars, which stay as they are. If the command is stopped, "
        "the same command continues; in a SLURM array or under torchrun each process has its own shards.",
    )
    parser.add_argument(
        "shards", nargs="+", metavar="IN", help="tars, as for ov2 train --train-data: braces, ::, pipe:"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the caption set")
    add_flags(parser, WriteOptions)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(format="ov2: %(message)s")
    logging.getLogger("open_clip_ov2.captions").setLevel(logging.INFO)
    shards = "::".join(args.shards)
    print(run(expand_shards(shards)[0], shards, args.out, WriteOptions(**flag_values(WriteOptions, args))))

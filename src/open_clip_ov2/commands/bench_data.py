"""`ov2 bench data`: can the loader keep up?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError

PLENTY = "100000000"  # samples of an epoch, so that none ends while it is measured


def main(argv: Sequence[str]) -> None:
    args, rest = _parser().parse_known_args(argv)
    for name, least in (("samples", 1), ("workers", 0), ("resolution", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: at least {least}")
    from open_clip_ov2.compare.bench.pipeline import loader_speed, pipeline_table, stages
    from open_clip_ov2.openclip.run.data_parts import data_parts

    size = ["--force-image-size", str(args.resolution), "--train-num-samples", PLENTY, "--workers", "0"]
    parts = data_parts(["--model", args.model, "--train-data", args.train_data, *size, *rest])
    torch.set_num_threads(1)  # as data workers have it
    found = stages(parts.source, parts.decoder, parts.tokenizer, samples=args.samples, batch_size=parts.batch_size)
    loaders = []
    for workers in dict.fromkeys((0, args.workers)):
        loader = parts.loader(workers)
        loaders.append((workers, loader_speed(loader, workers, args.samples)))
        loader.close()
    print(f"{parts.resolution} px, batches of {parts.batch_size}, {args.samples} samples, {args.model}\n")
    print(pipeline_table(found, loaders))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 bench data",
        description="Images a second by stage of the data pipeline, on one core, and of the whole loader. Further "
        "flags are those of `ov2 train`: --caption-keys, --tokenizer, --batch-size, --color-jitter, ...",
    )
    add = parser.add_argument
    add("--train-data", required=True, metavar="SHARDS", help="as for ov2 train")
    add("--model", default="ov2-vit-l-14", metavar="NAME", help="whose crops and tokens (default: %(default)s)")
    add("--resolution", type=int, default=84, metavar="PX", help="default: %(default)s")
    add("--samples", type=int, default=1024, metavar="N", help="of each measurement (default: %(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help="data workers (default: one for each core)")
    return parser

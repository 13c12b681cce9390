"""`ov2 bench data`: can the loader keep up?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, flag_type
from open_clip_ov2.compare.bench.settings import cores
from open_clip_ov2.tables import whole

PLENTY = "100000000"  # samples of an epoch, so that none ends while it is measured


def main(argv: Sequence[str]) -> None:
    args, rest = _parser().parse_known_args(argv)
    from open_clip_ov2.compare.bench.pipeline import loader_speed, pipeline_table, stages

    size = ["--force-image-size", str(args.resolution), "--train-num-samples", PLENTY, "--workers", "0"]
    loader_of = training.train_loaders(["--model", args.model, "--train-data", args.train_data, *size, *rest])
    torch.set_num_threads(1)  # as data workers have it
    stream = loader_of(0).stream
    found, loaders = stages(stream, args.samples), []
    for workers in dict.fromkeys((0, args.workers)):
        loader = loader_of(workers)
        loaders.append((workers, loader_speed(loader, workers, args.samples)))
        loader.close()
    about = f"{args.resolution} px, batches of {stream.layout.batch_size}, at most {args.samples} samples, {args.model}"
    print(f"{about}\n\n{pipeline_table(found, loaders)}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 bench data",
        description="Images per second of each stage of the data pipeline on one core, and of the whole loader. "
        "Further flags are those of `ov2 train`: --caption-keys, --tokenizer, --batch-size, --color-jitter, ...",
    )
    add, count = parser.add_argument, flag_type(whole(1))
    add("--train-data", required=True, metavar="SHARDS", help="as for ov2 train")
    add("--model", default="ov2-vit-l-14", metavar="NAME", help="its crops and tokens (default: %(default)s)")
    add("--resolution", type=count, default=84, metavar="PX", help="default: %(default)s")
    most = "most samples in each measurement (default: %(default)s)"
    add("--samples", type=count, default=1024, metavar="N", help=most)
    add("--workers", type=flag_type(whole(0)), default=cores(), metavar="N", help="default: one for each core")
    return parser

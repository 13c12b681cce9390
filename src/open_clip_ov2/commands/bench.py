"""`ov2 bench`: a training step of ov2 against CoCa and CLIP around the same encoder; `ov2 bench data`: the loader."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, add_flags, flag_type, flag_values
from open_clip_ov2.commands.options import add_device
from open_clip_ov2.compare.bench.settings import SETTINGS, BenchSettings, cores
from open_clip_ov2.files import write_json, write_text
from open_clip_ov2.tables import comma_separated, text, whole

PLENTY = "100000000"  # samples of an epoch, so that none ends while it is measured


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == "data":
        return _measure_loader(argv[1:])
    settings, args = parsed(argv)
    paths = {kind: getattr(args, kind) or args.out / f"bench.{kind}" for kind in ("json", "md")}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    from open_clip_ov2.compare.bench.bench_report import as_markdown
    from open_clip_ov2.compare.bench.turns import run_bench

    about = {"command": shlex.join(["ov2", "bench", *argv]), "date": datetime.date.today().isoformat()}
    for found in run_bench(settings, partial(print, file=sys.stderr, flush=True)):
        write_json(paths["json"], about | found)
        write_text(paths["md"], as_markdown(about | found))
    print(paths["md"].read_text(encoding="utf-8"))
    print(", ".join(str(path) for path in paths.values()))


def parsed(argv: Sequence[str]) -> tuple[BenchSettings, argparse.Namespace]:
    """What these flags say, and all of them. Raises UserError."""
    args = _parser().parse_args(argv)
    given = {name: value for name, value in flag_values(BenchSettings, args).items() if value is not None}
    setting = SETTINGS[args.setting or ("large" if args.device.startswith("cuda") else "small")]
    return BenchSettings(device=args.device, **{**setting, **given}), args


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 bench",
        description="Time and memory of a training step (forward, backward, update) of ov2 against CoCa and CLIP "
        "around the same encoder, which train exactly as stock OpenCLIP trains them. "
        "`ov2 bench data` measures the loader.",
    )
    add = parser.add_argument
    add("--setting", choices=SETTINGS, help="defaults by name (default: large on a GPU, small elsewhere)")
    add_flags(parser, BenchSettings)
    add_device(parser)
    former = flag_type(comma_separated(text))
    add("--arms", dest="variants", type=former, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    files = parser.add_argument_group("output").add_argument
    files("--out", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    files("--json", type=Path, metavar="FILE", help="default: DIR/bench.json")
    files("--markdown", type=Path, dest="md", metavar="FILE", help="default: DIR/bench.md")
    return parser


def _measure_loader(argv: Sequence[str]) -> None:
    args, rest = _loader_parser().parse_known_args(argv)
    import torch

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


def _loader_parser() -> argparse.ArgumentParser:
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

"""`ov2 bench`: a training step of ov2 against CoCa and CLIP around the same encoder."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser, flag_type
from open_clip_ov2.commands.options import add_device, comma_separated
from open_clip_ov2.compare.bench.settings import SETTINGS, VARIANTS, BenchSettings, CaptionLengths, Case
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import write_json, write_text
from open_clip_ov2.recipe.model_costs import PRECISION
from open_clip_ov2.tables import one_of, real, text, whole


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] == "data":
        from open_clip_ov2.commands import bench_data

        bench_data.main(argv[1:])
        return
    args = _parser().parse_args(argv)
    settings = bench_settings(args)
    paths = {kind: getattr(args, kind) or args.out / f"bench.{kind}" for kind in ("json", "md", "png")}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    from open_clip_ov2.compare.bench.bench_report import as_json, as_markdown, plot_results
    from open_clip_ov2.compare.bench.turns import run_bench

    written = (shlex.join(["ov2", "bench", *argv]), datetime.date.today().isoformat())
    for results in run_bench(settings, lambda line: print(line, file=sys.stderr, flush=True)):
        write_json(paths["json"], as_json(settings, results, *written))
        write_text(paths["md"], as_markdown(settings, results, *written))
        plot_results(results, paths["png"])
    print(paths["md"].read_text(encoding="utf-8"))
    print(", ".join(str(path) for path in paths.values()))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 bench",
        description="Time and memory of a training step (forward, backward, update) of ov2 against CoCa and CLIP "
        "around the same encoder, which train exactly as stock OpenCLIP trains them. "
        "`ov2 bench data` measures the loader.",
    )
    _add_cases(parser.add_argument)
    _add_measurements(parser)
    files = parser.add_argument_group("output").add_argument
    files("--out", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    files("--json", type=Path, metavar="FILE", help="default: DIR/bench.json")
    files("--markdown", type=Path, dest="md", metavar="FILE", help="default: DIR/bench.md")
    files("--plot", type=Path, dest="png", metavar="FILE", help="default: DIR/bench.png")
    return parser


def _add_cases(add: Callable[..., Any]) -> None:
    numbers, lengths = comma_separated(whole(1)), flag_type(CaptionLengths.parse)
    add("--setting", choices=SETTINGS, help="defaults by name (default: large on a GPU, small elsewhere)")
    add("--model", metavar="NAME", help="an ov2 model")
    names = "ov2; coca, clip: around the encoder of --model; names of OpenCLIP's registry (default: ov2,coca,clip)"
    add("--variants", "--arms", type=comma_separated(text), default=VARIANTS, metavar="A,B,...", help=names)
    add("--resolution", type=numbers, metavar="PX,...", help="one case each")
    add("--precision", type=comma_separated(one_of(*PRECISION)), metavar="P,...", help="one case each")
    add("--batch-size", type=numbers, metavar="N,...", help="one case each; of several, the best is reported too")
    add("--keep-ratio", type=flag_type(real(0, 1, above=True)), metavar="R", help="of ov2 (default: the model's)")
    tokens = "tokens of a caption, begin and end included (default: 12:128:64)"
    add("--caption-tokens", type=lengths, default=CaptionLengths(), metavar="LOW:HIGH:MEAN", help=tokens)
    add("--compile", action="store_true", help="ov2 block by block, the others as OpenCLIP's --torchcompile does it")
    budget = "with --compile: ov2 train's --activation-memory-budget"
    add("--memory-budget", type=flag_type(real(0, 1)), metavar="F", help=budget)


def _add_measurements(parser: Parser) -> None:
    add, count = parser.add_argument, flag_type(whole(1))
    add_device(parser)
    add("--threads", type=count, metavar="N", help="torch's threads on a CPU")
    add("--repetitions", type=count, default=5, metavar="N", help="of each variant, in turns (default: %(default)s)")
    add("--steps", type=count, metavar="N", help="timed together in a repetition (default: by --setting)")
    add("--largest-batch", action="store_true", help="find the largest batch of each variant, at each resolution")
    limit = "GPU memory that a process may use; on a CPU, what a batch of --largest-batch may use"
    add("--memory-limit-gb", type=flag_type(real(0, above=True)), metavar="G", help=limit)


def bench_settings(args: argparse.Namespace) -> BenchSettings:
    """Flags over the setting's defaults. Raises UserError."""
    gpu = args.device.startswith("cuda")
    setting = SETTINGS[args.setting or ("large" if gpu else "small")]
    if args.largest_batch and not gpu and args.memory_limit_gb is None:
        raise UserError("--largest-batch: on a CPU it needs --memory-limit-gb, the memory that a batch may use")
    if args.memory_budget is not None and not args.compile:
        raise UserError(f"--memory-budget {args.memory_budget:g}: it needs --compile")
    same = ("device", "compile", "memory_budget", "keep_ratio", "repetitions", "largest_batch", "memory_limit_gb")
    return BenchSettings(
        model=args.model or setting.model,
        variants=args.variants,
        cases=tuple(
            Case(resolution, precision, batch_size)
            for resolution in args.resolution or setting.resolutions
            for precision in args.precision or setting.precisions
            for batch_size in args.batch_size or setting.batch_sizes
        ),
        lengths=args.caption_tokens,
        steps=args.steps or setting.steps,
        threads=args.threads,
        **{name: getattr(args, name) for name in same},
    )

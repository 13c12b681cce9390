"""`ov2 bench`: ov2 against CoCa and CLIP of the same encoder, on this machine. `ov2 bench data` is bench_data.py."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import add_device
from open_clip_ov2.compare.bench.cases import ARMS, SETTINGS, BenchSettings, CaptionLengths, Case
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.model_costs import PRECISION


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
    from open_clip_ov2.compare.bench.bench_report import as_json, as_markdown
    from open_clip_ov2.compare.bench.plot import plot_results
    from open_clip_ov2.compare.bench.run import run_bench

    said = (shlex.join(["ov2", "bench", *argv]), datetime.date.today().isoformat())
    for results in run_bench(settings, lambda line: print(line, file=sys.stderr, flush=True)):
        plain = as_json(settings, results, *said)
        paths["json"].write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        paths["md"].write_text(as_markdown(settings, results, *said), encoding="utf-8")
        plot_results(results, paths["png"])
    print(paths["md"].read_text(encoding="utf-8"))
    print(", ".join(str(path) for path in paths.values()))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 bench",
        description="A training step (forward, backward, update) of ov2 against CoCa and CLIP of the same encoder, "
        "these exactly as stock OpenCLIP runs them. `ov2 bench data --help`: can the loader keep up?",
    )
    add = parser.add_argument
    add("--setting", choices=SETTINGS, help="defaults by name (default: large on a GPU, small elsewhere)")
    add("--model", metavar="NAME", help="an ov2 model")
    add(
        "--arms", default=",".join(ARMS), metavar="A,B,...",
        help="ov2; coca, clip: counterparts of --model; names of OpenCLIP's registry (default: %(default)s)",
    )  # fmt: skip
    add("--resolution", metavar="PX,...", help="one case each")
    add("--precision", metavar="P,...", help="one case each")
    add("--batch-size", metavar="N,...", help="one case each; of several, each arm's best is reported too")
    add("--keep-ratio", type=float, metavar="R", help="of ov2 (default: the model's)")
    add("--caption-tokens", default="12:128:64", metavar="LOW:HIGH:MEAN",
        help="tokens of a caption, begin and end included (default: %(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="ov2 block by block, the others as OpenCLIP's --torchcompile does it")
    add("--memory-budget", type=float, metavar="F", help="with --compile: ov2 train's --activation-memory-budget")
    add_device(parser)
    add("--threads", type=int, metavar="N", help="of torch on a CPU")
    add("--repetitions", type=int, default=5, metavar="N", help="of each arm, in turns (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="timed together in a repetition (default: by --setting)")
    add("--largest-batch", action="store_true", help="look for the largest batch of each arm, at each resolution")
    add("--memory-limit-gb", type=float, metavar="G",
        help="what a GPU lets a process have; on a CPU, what --largest-batch may count up to")  # fmt: skip
    files = parser.add_argument_group("output").add_argument
    files("--out", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    files("--json", type=Path, metavar="FILE", help="default: DIR/bench.json")
    files("--markdown", type=Path, dest="md", metavar="FILE", help="default: DIR/bench.md")
    files("--plot", type=Path, dest="png", metavar="FILE", help="default: DIR/bench.png")
    return parser


def bench_settings(args: argparse.Namespace) -> BenchSettings:
    """Flags over the setting's defaults. Raises UserError."""
    gpu = args.device.startswith("cuda")
    setting = SETTINGS[args.setting or ("large" if gpu else "small")]
    resolutions = _numbers("--resolution", args.resolution) or setting.resolutions
    sizes = _numbers("--batch-size", args.batch_size) or setting.batch_sizes
    precisions = tuple(args.precision.split(",")) if args.precision else setting.precisions
    for precision in precisions:
        if precision not in PRECISION:
            raise UserError(f"--precision {precision}: there are {', '.join(PRECISION)}")
    for flag in ("repetitions", "steps", "threads"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value}: at least 1")
    if args.largest_batch and not gpu and args.memory_limit_gb is None:
        raise UserError("--largest-batch on a CPU: say --memory-limit-gb, up to which memory is counted")
    if args.memory_budget is not None and not (args.compile and 0 <= args.memory_budget <= 1):
        raise UserError(f"--memory-budget {args.memory_budget:g}: from 0 to 1, and with --compile")
    arms = tuple(dict.fromkeys(args.arms.split(",")))
    return BenchSettings(
        model=args.model or setting.model,
        arms=arms,
        cases=tuple(Case(px, precision, size) for px in resolutions for precision in precisions for size in sizes),
        device=args.device,
        compile=args.compile,
        memory_budget=args.memory_budget,
        keep_ratio=args.keep_ratio,
        lengths=CaptionLengths.parse(args.caption_tokens),
        repetitions=args.repetitions,
        steps=args.steps or setting.steps,
        largest_batch=args.largest_batch,
        memory_limit_gb=args.memory_limit_gb,
        threads=args.threads,
    )


def _numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """Comma-separated whole numbers above 0. Raises UserError."""
    if text is None:
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r}: whole numbers with commas between them, for example 84,224") from None
    if min(numbers) < 1:
        raise UserError(f"{flag} {text}: at least 1")
    return numbers

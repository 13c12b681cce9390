"""The rows of scripts/bench_gpu.sh: measures them one after the other, and writes the table after each.

Each row is an `ov2 bench` command, which the table shows, in bfloat16 autocast with captions of 12 to 128 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.commands.bench import parsed
from open_clip_ov2.compare.bench import turns
from open_clip_ov2.compare.bench.settings import machine_facts
from open_clip_ov2.errors import RunFailed, UserError, first_line
from open_clip_ov2.files import write_text
from open_clip_ov2.tracking.text_table import markdown

TINY = os.environ.get("TINY") == "1"
MINUTES = float(os.environ.get("MINUTES", "12"))
ROW_S = 150.0  # most seconds of a row: compiling L/14 and g/14 took up to a minute
OUT = Path(os.environ.get("OUT", "bench/gpu"))
L14, G14 = "--model ov2-vit-l-14 --variants ov2", "--model ov2-vit-g-14 --variants ov2"
H14 = "--model ov2-vit-h-14 --variants ov2"
WHOLE, GRAPHS = "--ov2-flags='--compile-encoder whole'", "--ov2-flags='--compile-encoder cuda-graphs'"
LEAN, LEAN8 = "--ov2-flags=--recompute-elementwise", "--ov2-flags='--recompute-elementwise --fp8 on'"
# Most valuable first. A row with several batches tries them until one fits into memory.
ROWS = {
    "l14-224": f"{L14} --resolution 224 --batch-size 256 --compile",
    "l14-84": f"{L14} --resolution 84 --batch-size 1024 --compile",
    "g14-224": f"{G14} --resolution 224 --batch-size 128,96,64 --compile --memory-limit-gb 80 {LEAN}",
    "g14-224-fp8": f"{G14} --resolution 224 --batch-size 128,96,64 --compile --memory-limit-gb 80 {LEAN8}",
    "coca-224-128": "--model ov2-vit-l-14 --variants coca_ViT-L-14 --resolution 224 --batch-size 128",
    "l14-224-128-lean": f"{L14} --resolution 224 --batch-size 128 {LEAN}",
    "l14-84-graphs": f"{L14} --resolution 84 --batch-size 1024 --compile {GRAPHS}",
    "l14-84-whole": f"{L14} --resolution 84 --batch-size 1024 --compile {WHOLE}",
    "l14-224-whole": f"{L14} --resolution 224 --batch-size 256 --compile {WHOLE}",
    "l14-224-fp8": f"{L14} --resolution 224 --batch-size 256 --compile --ov2-flags='--fp8 on'",
    "h14-224": f"{H14} --resolution 224 --batch-size 256,192,128 --compile",
    "h14-224-fp8": f"{H14} --resolution 224 --batch-size 256,192,128 --compile --ov2-flags='--fp8 on'",
    "l14-224-fa3": f"{L14} --resolution 224 --batch-size 256 --compile --ov2-flags='--attention-kernel FA3'",
    "l14-224-fa4": f"{L14} --resolution 224 --batch-size 256 --compile --ov2-flags='--attention-kernel FA4'",
    "coca-224-compiled": "--model ov2-vit-l-14 --variants coca_ViT-L-14 --resolution 224 --batch-size 128 --compile",
    "l14-224-128": f"{L14} --resolution 224 --batch-size 128",
    "l14-224-512-lean": f"{L14} --resolution 224 --batch-size 512,384 --compile {LEAN}",
    "l14-224-640-budget": f"{L14} --resolution 224 --batch-size 640 --compile --memory-budget 0.3",
    "coca-84-256": "--model ov2-vit-l-14 --variants coca_ViT-L-14 --resolution 84 --batch-size 256",
    "turns-224": "--model ov2-vit-l-14 --variants ov2,coca_ViT-L-14 --resolution 224 --batch-size 64 --compile",
}
NEEDS = {"l14-224-fa3": "flash_attn_interface", "l14-224-fa4": "flash_attn"}  # a package for each attention kernel
STAGE_SAMPLES = {84: 12.8e9, 224: 1.02e9}  # of L/14's schedule, docs/reference.md


@dataclass
class Row:
    """One model in one row. `failure` says why there are no figures."""

    name: str
    variant: str
    command: str
    batch: int = 0
    step_s: list[float] = field(default_factory=list)
    images_s: float = 0.0
    mfu: float = 0.0
    step_gb: float = 0.0
    peak_tflops: float = 0.0
    failure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash scripts/bench_gpu.sh")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all, in their order")
    parser.add_argument("--list", action="store_true", help="name the rows and their commands")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: ov2 bench {command}" for name, command in ROWS.items()))
        return
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r} (--list names them)")
    if not TINY and not torch.cuda.is_available():
        parser.exit(1, "bench_gpu: torch sees no GPU here (TINY=1 tries the script itself on a CPU)\n")
    turns.CONTEXT = multiprocessing.get_context("forkserver")  # imports once; the server itself never uses CUDA
    turns.CONTEXT.set_forkserver_preload(["open_clip_ov2.openclip.run.bench_model"])
    begin, done = time.monotonic(), list[Row]()
    first = turns.CONTEXT.Process(target=int)  # waits for the imports, which are no row's
    first.start()
    first.join()
    OUT.mkdir(parents=True, exist_ok=True)
    for name in args.rows or ROWS:
        left = 60 * MINUTES - (time.monotonic() - begin)
        done += measured(name, min(ROW_S, left)) if left > 0 else [Row(name, "", ROWS[name], failure="no time left")]
        write_text(OUT / "rows.jsonl", "".join(f"{json.dumps(vars(row))}\n" for row in done))
        write_text(OUT / "table.md", page(done, time.monotonic() - begin))
    print((OUT / "table.md").read_text())


def measured(name: str, seconds: float) -> list[Row]:
    """The row of each variant of a command, in turns. What goes wrong is written into the row."""
    command = ROWS[name]
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        return [Row(name, "ov2", command, failure=f"no package {NEEDS[name]} here")]
    argv = shlex.split(small(command) if TINY else command)
    device = "cpu" if TINY else "cuda"
    settings, _ = parsed([*argv, "--precision", "amp_bf16", "--device", device])
    print(f"{name}: ov2 bench {shlex.join(argv)}", flush=True)
    for case in settings.cases:
        rows = {variant: Row(name, variant, command, case.batch_size) for variant in settings.variants}
        try:
            with time_limit(seconds), contextlib.ExitStack() as stack:
                running = {v: stack.enter_context(turns.Variant(settings.job(v, case))) for v in rows}
                fill(rows, running)
        except turns.OutOfMemory:
            next(iter(rows.values())).failure = "out of memory"
            continue
        except (OutOfTime, RunFailed, UserError) as error:
            for row in rows.values():
                row.failure = row.failure or first_line(error)
        break
    for row in rows.values():
        print(f"  {', '.join(text for text in shown(row)[1:] if text)}", flush=True)
    return list(rows.values())


def fill(rows: dict[str, Row], running: dict[str, turns.Variant]) -> None:
    flops = {variant: one.ask("facts")["image_flops"] for variant, one in running.items()}
    for variant, one in running.items():
        rows[variant].step_gb = one.ask("memory")["step_bytes"] / 1e9
        rows[variant].peak_tflops = one.ask("peak")["flops"] / 1e12
    for _ in range(2 if TINY else 3):
        for variant, one in running.items():
            row = rows[variant]
            row.step_s.append(one.ask("time", 1 if TINY else 5)["step_s"])
            row.images_s = row.batch / statistics.median(row.step_s)
            row.mfu = row.images_s * flops[variant] / (1e12 * row.peak_tflops)
    for variant, one in running.items():
        row = rows[variant]
        target = TARGETS.get(row.name)
        if target and row.mfu < target:
            with (OUT / "kernels.txt").open("a", encoding="utf-8") as file:
                print(f"{row.name}: MFU {row.mfu:.1%} of {target:.0%}\n{one.ask('kernels', 30)}\n", file=file)


class OutOfTime(Exception):
    """Of a row."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime and ends the processes of the row when the time is over."""

    def over(*_: Any) -> None:
        for process in multiprocessing.active_children():
            process.kill()
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def small(command: str) -> str:
    """The same flags for a model that a CPU trains in a moment."""
    for before, after in {
        "ov2-vit-l-14": "ov2-bench-tiny", "ov2-vit-g-14": "ov2-bench-tiny", "ov2-vit-h-14": "ov2-bench-tiny",
        "coca_ViT-L-14": "coca",
        "--resolution 224": "--resolution 16", "--resolution 84": "--resolution 16", "--fp8 on": "--fp8 emulated",
    }.items():  # fmt: skip
        command = command.replace(before, after)
    return f"{re.sub('(?<=--batch-size )[0-9]+', '4', command)} --caption-tokens 4:16:8"


# --- the table --------------------------------------------------------------------------------------------

TIMES = ["row", "variant", "batch", "ms a step (least to greatest)", "images/s", "MFU", "step memory, GB"]
TARGETS = {"l14-224": 0.60, "l14-84": 0.56, "g14-224": 0.55}  # MFU


def page(rows: list[Row], seconds: float) -> str:
    facts = machine_facts("cpu" if TINY else "cuda")
    peak = statistics.median([row.peak_tflops for row in rows if row.peak_tflops] or [0.0])
    lines = [
        f"{facts.pop('device')}, driver {driver()}, {', '.join(f'{name} {text}' for name, text in facts.items())}; "
        f"{peak:,.4g} TFLOP/s dense bf16 measured in the same runs; {datetime.date.today().isoformat()}, "
        f"{seconds / 60:.1f} minutes. {'Tiny models on a CPU: the figures mean nothing.' if TINY else ''}",
        "", markdown([["where", "target", "measured", "row"], *goals(rows)]), "",
        markdown([TIMES, *map(shown, rows)]), "",
        *(f"- `{name}`: `ov2 bench {ROWS[name]}`" for name in dict.fromkeys(row.name for row in rows)), "",
        "One GPU has nothing to shard: `--fsdp` is compared with DDP by tests on CPUs (docs/scale.md).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def goals(rows: list[Row]) -> list[list[str]]:
    """The targets. What was not measured says so."""

    def best(start: str, *without: str) -> Row | None:
        found = [r for r in rows if r.name.startswith(start) and r.variant == "ov2" and not r.failure]
        return max((r for r in found if not any(w in r.name for w in without)), key=lambda r: r.images_s, default=None)

    def one(name: str) -> Row | None:
        return next((row for row in rows if row.name == name and not row.failure), None)

    def goal(where: str, target: str, of: list[Row | None], text: str) -> list[str]:
        whole = [row for row in of if row is not None]
        missing = len(whole) < len(of)
        return [where, target, "not measured" if missing else text, ", ".join(row.name for row in whole)]

    l224, l84, g14, g14fp8 = best("l14-224", "fp8"), best("l14-84", "fp8"), one("g14-224"), one("g14-224-fp8")
    lean, coca = one("l14-224-128-lean"), one("coca-224-128")
    compiled, hours = one("coca-224-compiled"), 0.0
    if l84 and l224:
        hours = sum(STAGE_SAMPLES[px] / row.images_s / 3600 for px, row in ((84, l84), (224, l224)))
    return [
        goal("L/14, 224 px, bf16: MFU", "60%", [l224], f"{l224.mfu:.1%}" if l224 else ""),
        goal("L/14, 84 px, bf16: MFU", "56%", [l84], f"{l84.mfu:.1%}" if l84 else ""),
        goal("g/14, 224 px, 80 GB", "trains; 55%", [g14], f"batch {g14.batch}, {g14.mfu:.1%}" if g14 else ""),
        goal("g/14: fp8 over bf16, images/s", "1.2 x", [g14, g14fp8],
             f"{g14fp8.images_s / g14.images_s:.2f} x" if g14 and g14fp8 else ""),
        goal("step memory over stock CoCa, batch 128, 224 px", "0.5", [lean, coca],
             f"{lean.step_gb / coca.step_gb:.2f}" if lean and coca else ""),
        goal("L/14, 84 then 224 px, whole schedule, GPU hours", "1,300", [l84, l224], f"{hours:,.0f}"),
        goal("images/s over CoCa, both compiled, 224 px", "", [l224, compiled],
             f"{l224.images_s / compiled.images_s:.2f} x" if l224 and compiled else ""),
    ]  # fmt: skip


def shown(row: Row) -> list[str]:
    if row.failure:
        return [row.name, row.variant, str(row.batch or ""), row.failure, "", "", ""]
    low, middle, high = (f"{1e3 * f(row.step_s):,.4g}" for f in (min, statistics.median, max))
    times, speed = f"{middle} ({low} to {high})", f"{row.images_s:,.4g}"
    return [row.name, row.variant, str(row.batch), times, speed, f"{row.mfu:.1%}", f"{row.step_gb:.3g}"]


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    main()

"""Kill `ov2 captions write` again and again, and compare its sidecars with those of a run that nobody disturbs.

    python scripts/captions_soak.py OUT [--kills 36] [--seed 0]

For the package's own model and a tiny LLaVA of transformers, in one process and in three: each kill comes at a random
moment after a line that was drawn among those still to be written, and half of them tear the journal's last line as a
machine that loses power may. A kill counts if it hit a process that was at work.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(  # seconds of imports, once
    ["open_clip_ov2.captions.write_options", "open_clip_ov2.captions.engine_ov2", "captions_soak", "transformers"]
)
TESTS = Path(__file__).parents[1] / "tests"
TARS, EACH = 6, 60  # samples of each tar
PAUSE_S = 0.05  # a batch of either engine takes about as long


def write(argv: Sequence[str], task: str) -> None:
    """One process of the command; its exit status is that of the process."""
    from open_clip_ov2.cli import main

    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    sys.exit(main(["captions", "write", *argv, "--task", task]))


def start(argv: Sequence[str], tasks: int) -> list[Any]:
    processes = [SERVER.Process(target=write, args=(list(argv), f"{task}/{tasks}")) for task in range(tasks)]
    for process in processes:
        process.start()
    return processes


def finish(argv: Sequence[str], tasks: int, timeout_s: float = 600) -> None:
    """Run the command to its end. Raises RuntimeError if a process fails."""
    processes = start(argv, tasks)
    for process in processes:
        process.join(timeout_s)
        if process.exitcode != 0:
            raise RuntimeError(f"a process ended with {process.exitcode}")


def sidecars(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.jsonl.gz")}


def written(folder: Path) -> int:
    """Lines on disk, in journals and finished sidecars."""
    total = 0
    for path in (*folder.glob(".writing/*/lines.jsonl"), *folder.glob("*.jsonl.gz")):
        with contextlib.suppress(OSError):  # a journal goes when its sidecar is whole
            data = path.read_bytes()
            total += (gzip.decompress(data) if path.suffix == ".gz" else data).count(b"\n")
    return total


def soak(argv: Sequence[str], out: Path, tasks: int, kills: int, samples: int, rng: random.Random) -> int:
    """Kill the command's processes again and again, then let it finish; how many kills hit a process at work.

    A kill comes up to PAUSE_S after a line that was drawn is on disk; the lines are drawn from those still to come, one
    after the other, with room for the kills that follow.
    """
    hit = 0
    for kill in range(kills):
        processes, before = start([*argv, "--out", str(out)], tasks), written(out)
        step = max(1, (samples - before) // (kills - kill + 1))
        line, deadline = before + rng.randint(1, step), time.monotonic() + 1800
        while written(out) < line and any(one.is_alive() for one in processes):
            if time.monotonic() > deadline:
                raise RuntimeError("no caption was written in half an hour")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, PAUSE_S))
        hit += any(one.is_alive() for one in processes)
        for one in processes:
            one.kill()
            one.join()
        torn = list(out.glob(".writing/*/lines.jsonl"))
        if torn and rng.random() < 0.5:
            with open(rng.choice(torn), "ab") as file:
                file.write(b'{"key": "0000')
    finish([*argv, "--out", str(out)], tasks)
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=36, help="for each engine and number of processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    from export_fixtures import make_language_model, make_run
    from square_shards import write_square_shards

    args.out.mkdir(parents=True)
    write_square_shards(args.out / "squares", TARS, EACH)
    language_model = args.out / "language_model"
    make_language_model(language_model)
    llava = make_run(args.out / "run").export("llava", args.out / "llava", "--language-model", str(language_model))
    shared = [f"{args.out}/squares/{{00000..00005}}.tar", "--batch-size", "4", "--condition", "txt", "--device", "cpu"]
    shared += ["--sampling", "top-k=5,temperature=1.2", "--sampling", "greedy,weight=0.5", "--max-tokens", "12"]
    rng = random.Random(args.seed)
    for engine, model in (("ov2", []), ("transformers", ["--model", str(llava)])):
        argv = [*shared, *model]
        whole = args.out / f"{engine}-undisturbed"
        finish([*argv, "--out", str(whole)], 1)
        wanted = sidecars(whole)
        for tasks in (1, 3):
            folder = args.out / f"{engine}-{tasks}"
            hit = soak(argv, folder, tasks, args.kills, TARS * EACH, rng)
            same = sidecars(folder) == wanted and len(wanted) == TARS
            print(
                f"{engine}, {tasks} process(es): {hit} of {args.kills} kills at work, sidecars equal: {same}",
                flush=True,
            )
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()

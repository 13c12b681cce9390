"""Kill a training run at random moments, again and again, and compare it with the run that was left alone.

    python scripts/kill_soak.py [--kills 100] [--seed 0] [--folder DIR] [--elastic]

Two processes with two data workers each train a tiny ov2 model over two stages on made-up shards; one of the two, by
chance, gets SIGKILL after a random number of steps, every other time while a checkpoint is being written. Then the
same command is started again. At the end the weights, and every figure in results.jsonl, must be the uninterrupted
run's, bit for bit. tests/openclip/test_resume.py does the same with ten kills.

With --elastic the command is started again on another number of processes (2, 1, 2, 1, ...), data workers and batches
to accumulate; at each step the samples of all processes must then be the uninterrupted run's, and losses and weights
the same to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_clip_ov2.train.step import StepReport

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "openclip")]

from conftest import write_square_shards, write_vocabulary  # noqa: E402
from training import (  # noqa: E402
    TINY_MODEL,
    Killer,
    Rank,
    assert_equal_weights,
    figures,
    finish,
    samples_of,
    start,
    start_ranks,
    wait_for,
    weights,
)


def flags(data: Path, logs: Path, kills: int) -> list[str]:
    """Long enough for so many kills: a start makes some eight steps of 8 samples."""
    first = second = 48 * kills
    return [
        "--model", TINY_MODEL, "--force-context-length", "12", "--tokenizer", str(data / "vocabulary"),
        "--train-data", f"{data}/train/{{00000..00003}}.tar", "--val-data", f"{data}/val/00000.tar", "--workers", "2",
        "--batch-size", "4", "--warmup", "1", "--log-every-n-steps", "1", "--save-every-steps", "2",
        "--sample-captions", "0", "--caption-keys", "json:recaption,txt", "--logs", str(logs), "--name", "run",
        "--stage", f"16:samples={first},lr=1e-3", "--stage", f"24:samples={second},lr=5e-4",
    ]  # fmt: skip


def recorded(keys: str, *flags: str) -> int:
    """`ov2 train`, and the keys of each of this process's steps in a file of its own."""
    from open_clip_ov2.cli import main as ov2
    from open_clip_ov2.openclip.run.stage_progress import StageProgress

    after_step = StageProgress.after_step

    def record(progress: StageProgress, report: StepReport) -> None:
        with open(f"{keys}-{os.getpid()}", "a") as file:
            seen = progress.samples_seen + report.entries * progress.global_batch
            file.write(json.dumps([progress._stage.number, seen, sorted(report.keys)]) + "\n")
        after_step(progress, report)

    StageProgress.after_step = record  # type: ignore[method-assign]
    return ov2(["train", *flags])


def samples_of_steps(folder: Path, name: str) -> dict[tuple[int, int], list[list[str]]]:
    """By stage and samples seen: what each launch that made this step saw in it, all its processes together."""
    launches: dict[str, dict[tuple[int, int], list[str]]] = {}
    for path in folder.glob(f"{name}-*-*"):
        steps = launches.setdefault(path.name.rsplit("-", 1)[0], {})
        for line in path.read_text().splitlines():
            stage, seen, keys = json.loads(line)
            steps.setdefault((stage, seen), []).extend(keys)
    found: dict[tuple[int, int], list[list[str]]] = {}
    for steps in launches.values():
        for step, keys in steps.items():
            found.setdefault(step, []).append(sorted(keys))
    return found


def elastic(folder: Path, kills: int, seed: int) -> None:
    """The uninterrupted run on two processes, and one whose number of them changes at each kill."""
    more = ["--elastic", "2x2", "--shuffle-buffer", "5", "--keep-ratio", "0.3:0.9", "--global-batch", "8"]
    whole, run, rng = folder / "whole" / "run", folder / "killed" / "run", random.Random(seed)
    base = flags(folder, folder / "whole", kills)
    assert [status for status, _ in finish(start_ranks(recorded, [str(folder / "whole-0"), *base, *more], 2))] == [0, 0]
    for number in range(kills + 1):
        processes, workers = 2 - number % 2, rng.choice((1, 2))
        # One process accumulates: both halves of the global batch, or four quarters.
        cut = ["--batch-size", "4" if processes == 2 else rng.choice("842"), "--workers", str(workers)]
        target = samples_of(run) + rng.choice((8, 16, 24))
        command = [str(folder / f"killed-{number}"), *flags(folder, folder / "killed", kills), *more, *cut]
        ranks: list[Rank] = start_ranks(recorded, command, processes)
        if number < kills:
            wait_for(lambda target=target: samples_of(run) >= target, ranks)
            os.killpg(os.getpgid(rng.choice(ranks).pid), signal.SIGKILL)
        print(number, cut, [status for status, _ in finish(ranks, 600)], samples_of(run), flush=True)
    expected, found = (samples_of_steps(folder, name) for name in ("whole", "killed"))
    steps = sum(len(keys) == 8 for launches in found.values() for keys in launches)
    assert expected.keys() == found.keys()
    for step, launches in found.items():  # a process that was killed may have made one step more than the other
        assert all(set(keys) <= set(expected[step][0]) for keys in launches), step
        assert expected[step][0] in launches, step
    pairs = list(zip(figures(whole), figures(run), strict=True))
    losses = [(one["loss"], other["loss"]) for one, other in pairs if one["kind"] == "train"]
    apart = max(abs(one - other) / one for one, other in losses)
    one, other = (weights(path / "checkpoints" / "stage_2.pt") for path in (whole, run))
    # Of keys' biases the gradient is rounding alone, which Adam makes as large as any.
    weight = max(float((one[name] - other[name]).abs().max()) for name in one if not name.endswith("in_proj_bias"))
    print(
        f"{kills} kills, {steps} whole steps: the same samples; {len(losses)} losses differ by at most "
        f"{apart:.1e} of each, weights by {weight:.1e}"
    )
    assert apart < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    parser.add_argument("--elastic", action="store_true")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-soak-"))
    write_square_shards(folder / "train", 4, 8)
    write_square_shards(folder / "val", 1, 10, start=1000)
    write_vocabulary(folder / "vocabulary")
    if args.elastic:
        return elastic(folder, args.kills, args.seed)
    done = finish(start(flags(folder, folder / "whole", args.kills), 2), timeout_s=3600)
    if any(status for status, _ in done):
        sys.exit(f"the uninterrupted run failed: {done}")
    whole, run = folder / "whole" / "run", folder / "killed" / "run"
    killer, begin = Killer(run, args.kills, args.seed), time.monotonic()
    while not (run / "checkpoints" / "stage_2.pt").exists():
        killer.start_and_kill(flags(folder, folder / "killed", args.kills))
        if killer.kills % 10 == 0:
            print(
                f"{killer.kills} kills, {killer.while_writing} while writing, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    assert figures(run) == figures(whole), "figures differ"
    assert_equal_weights(*(weights(path / "checkpoints" / "stage_2.pt") for path in (run, whole)))
    print(f"{killer.kills} kills, {killer.while_writing} while a checkpoint was written: same weights, same figures")


if __name__ == "__main__":
    main()

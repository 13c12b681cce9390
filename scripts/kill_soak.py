"""Kill a training run at random moments, again and again, and compare it with the run that was left alone.

    python scripts/kill_soak.py [--kills 100] [--seed 0] [--folder DIR]

Two processes with two data workers each train a tiny ov2 model over two stages on made-up shards; one of the two, by
chance, gets SIGKILL after a random number of steps, every other time while a checkpoint is being written. Then the
same command is started again. At the end the weights, and every figure in results.jsonl, must be the uninterrupted
run's, bit for bit. tests/openclip/test_resume.py does the same with ten kills.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "openclip")]

from conftest import write_square_shards, write_vocabulary  # noqa: E402
from training import TINY_MODEL, Killer, assert_equal_weights, figures, finish, start, weights  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are written (default: a temporary folder)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-soak-"))
    write_square_shards(folder / "train", 4, 8)
    write_square_shards(folder / "val", 1, 10, start=1000)
    write_vocabulary(folder / "vocabulary")
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

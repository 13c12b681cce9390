"""Runs that are preempted, requeued, lose a node or a rank at random moments on a real SLURM, over and over.

    bash scripts/setup_debian.sh && python scripts/slurm_soak.py --repetitions 20 --seed 0

Each ends in the weights of the undisturbed run by torchrun, bit for bit, or the script ends with status 1.
Works in a folder of its own; prints a line for each repetition. About a minute each on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "slurm")]

import torch  # noqa: E402
from conftest import write_square_shards, write_vocabulary  # noqa: E402
from faults import FAULTS, RANKS, job_of, nano_flags, ov2, torchrun, wait_finished, wait_for_steps  # noqa: E402
from slurm_cluster import Cluster, missing  # noqa: E402

from open_clip_ov2.tracking.status import read_status  # noqa: E402


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "stage_1.pt", weights_only=True)["state_dict"]


def repetition(cluster: Cluster, place: Path, flags: list[str], number: int, chance: random.Random) -> tuple[str, bool]:
    """(faults and restarts, whether each fault restarted the run, its weights are right, and no job is left)."""
    kinds = list(FAULTS)
    names = [kinds[number % len(kinds)], *chance.sample(kinds, chance.choice((0, 0, 1)))]
    ov2("submit", *RANKS, "--", *flags, "--name", f"run-{number}", cwd=place)
    run = place / "logs" / f"run-{number}"
    hit: list[str] = []
    restarts = 0
    for name in names:
        if not wait_for_steps(run, restarts):
            break
        time.sleep(chance.uniform(0, 3))
        status = read_status(run)
        restarts = status.restarts + 1 if status else 1
        FAULTS[name](cluster, job_of(run))
        hit.append(name)
    found = wait_finished(run)
    one, other = weights(run), weights(place / "logs" / "reference")
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    seen = found.status.restarts if found.status else -1
    # A run that was over before it was disturbed would prove nothing.
    return f"{', '.join(hit)}: {seen} restarts", same and seen >= len(hit) == len(names) and not cluster.queue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    why = missing()
    if why is not None:
        print(f"slurm_soak: {why}", file=sys.stderr)
        return 1
    chance, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="ov2-soak-") as folder:
        place = Path(folder)
        write_square_shards(place / "squares" / "train", 4, 8)
        (place / "vocabulary").mkdir()
        write_vocabulary(place / "vocabulary")
        # Long enough for SLURM to give up a node that has lost its daemon alone.
        longer = ["--epochs", "150", "--save-every-steps", "10"]
        flags = [*nano_flags(place / "squares", place / "vocabulary"), *longer]
        if torchrun([*flags, "--name", "reference"], 4, place).wait():
            print("slurm_soak: the reference run failed", file=sys.stderr)
            return 1
        with Cluster(place / "slurm") as cluster:
            for number in range(args.repetitions):
                start = time.monotonic()
                text, right = repetition(cluster, place, flags, number, chance)
                wrong += not right
                print(
                    f"{number + 1:3d} {'right' if right else 'WRONG'} {time.monotonic() - start:4.0f} s  {text}",
                    flush=True,
                )
    print(f"{args.repetitions - wrong} of {args.repetitions} right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

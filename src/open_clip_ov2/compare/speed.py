"""Images/s of each arm, measured before anything is trained: short runs of `ov2 train`, in turn, nothing beside them.

Arms take turns within a repetition, so that what a machine does meanwhile falls on all of them alike; the ratio of two
arms is taken within each repetition. A run's own clock would be wrong where several run side by side.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.compare import trainer
from open_clip_ov2.compare.bench.machine import default_device, machine_facts
from open_clip_ov2.compare.kept import keep, key_of, read_kept
from open_clip_ov2.compare.processes import Command, run_all, threads_each
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.figures import read_results

LOGS_EACH = 8  # log steps of a measured run; what lies before the second one is warm-up
SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class Speed:
    """images/s of each repetition, and the process's largest resident set in MiB."""

    images_per_second: tuple[float, ...]
    memory_mb: float
    machine: str

    @property
    def median(self) -> float:
        return statistics.median(self.images_per_second)


def machine(threads: int) -> str:
    """In words, with the threads that a run has."""
    device = default_device()
    shared = f", {threads} thread{'s' if threads > 1 else ''} for each run" if device == "cpu" else ""
    return machine_facts(device)["device"] + shared


def measure(
    lines: Mapping[str, Sequence[str]],
    *,
    samples: int,
    batches: Mapping[str, int],
    repetitions: int,
    folder: Path,
    at_once: int,
    say: Callable[[str], None],
) -> dict[str, Speed]:
    """Speed of each line (`ov2 train` without --logs and --name), kept in folder/speed.json.

    `batches`: images in a step of each line. `at_once`: runs side by side later, whose threads each run gets here too.
    """
    threads, file = threads_each(at_once), folder / SPEED_FILE
    known = read_kept(file)
    key = key_of([list(lines.items()), threads])  # lines measured in turns with others stand for no others
    if key not in known or len(next(iter(known[key].values()))["images_per_second"]) < repetitions:
        found: dict[str, list[tuple[float, float]]] = {title: [] for title in lines}
        for repetition in range(repetitions):
            for title, argv in lines.items():
                steps = max(1, samples // batches[title])
                logged = [*argv, "--log-every-n-steps", str(max(1, steps // LOGS_EACH))]
                found[title].append(_once(title, logged, folder / "measured", threads))
            shown = ", ".join(f"{title} {values[-1][0]:.0f}" for title, values in found.items())
            say(f"images/s, repetition {repetition + 1} of {repetitions}: {shown}")
        known[key] = {title: asdict(_speed(values, threads)) for title, values in found.items()}
        keep(file, known)
    return {
        title: Speed(tuple(one["images_per_second"]), one["memory_mb"], one["machine"])
        for title, one in known[key].items()
    }


def _speed(values: Sequence[tuple[float, float]], threads: int) -> Speed:
    return Speed(tuple(rate for rate, _ in values), max(memory for _, memory in values), machine(threads))


def _once(title: str, argv: Sequence[str], scratch: Path, threads: int) -> tuple[float, float]:
    """(images/s, MiB)."""
    shutil.rmtree(scratch, ignore_errors=True)
    job = Command(f"measuring {title}", tuple(trainer.train_command(argv, scratch, "run")), scratch / "out.txt")
    run_all([job], 1, lambda *_: None, threads=threads)
    rows = [row for row in read_results(scratch / "run") if row["kind"] == "train"]
    rate = rate_of(rows)
    shutil.rmtree(scratch)
    return rate, float(rows[-1]["memory_mb"])


def rate_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Images/s from the second log step to the last, by the clock. Raises UserError where there is no third."""
    if len(rows) < 3:
        raise UserError("[measure] samples: too few to time (at least 4 steps)")
    first, last = rows[1], rows[-1]
    return (last["samples_seen"] - first["samples_seen"]) / (last["time"] - first["time"])

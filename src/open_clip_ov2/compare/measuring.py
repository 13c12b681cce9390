"""Before anything is trained: images/s of each stage of each variant, memory of a step of its last stage.

Images/s are of short runs of `ov2 train`, with nothing beside them. Variants take turns within a repetition, so that
whatever else the machine does falls on all of them alike. What was measured is cached in speed.json and costs.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from open_clip_ov2 import training
from open_clip_ov2.argv import value_of, without
from open_clip_ov2.compare.bench.settings import Job, machine_facts
from open_clip_ov2.compare.bench.turns import Log, largest_batch, step_memory
from open_clip_ov2.compare.config import Comparison, Variant
from open_clip_ov2.compare.plan import Study, global_batch, train_argv
from open_clip_ov2.compare.subprocesses import Command, run_all, threads_each
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.tracking.figures import read_results

LOGS_EACH = 8  # log steps of a measured run; everything before the second one is warm-up
TASKS = ("--eval", "--eval-every-samples")  # there is nothing to validate on while speed is measured
STOCK_VOCABULARY = "ov2-vit-nano-8"  # has OpenCLIP's own
MIB = 2**20


@dataclass(frozen=True)
class Speeds:
    """`rates`: images/s of each variant by stage and repetition; `machine`: what they were measured on."""

    machine: str
    rates: Mapping[str, Sequence[Sequence[float]]]

    @property
    def medians(self) -> dict[str, list[float]]:
        """Of each variant by stage."""
        return {name: [statistics.median(rates) for rates in stages] for name, stages in self.rates.items()}


@dataclass(frozen=True)
class Cost:
    """Memory of a training step in MiB and the largest batch, as `ov2 bench` measures them; None if not asked for."""

    step_memory_mb: float | None = None
    largest_batch: int | None = None


Costs = Mapping[str, Cost]  # of a step of each variant


def key_of(value: Any) -> str:
    """Sixteen hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def cached(file: Path, what: Any, measure: Callable[[], Any]) -> Any:
    """What was measured before, from a JSON file, or is now. Raises UserError for another kind of file."""
    known = read_json(file, dict, "measurements of `ov2 compare`") if file.is_file() else {}
    key = key_of(what)
    if key not in known:
        known[key] = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return known[key]


def measure_speeds(study: Study, comparison: Comparison, log: Log) -> Speeds:
    """Images/s of each stage of each variant. Raises UserError."""
    measure, threads = comparison.measure, threads_each(study.at_once)
    argvs: dict[str, list[str]] = {}  # by the title of a variant and stage
    for variant in comparison.variants:
        batch = global_batch(comparison, variant)
        steps = max(4, measure.samples // batch)
        for title, stage in zip(_titles(variant), variant.stages, strict=True):
            argv = without(train_argv(study, comparison, variant, [(stage.resolution, steps * batch)]), TASKS)
            argvs[title] = [*argv, "--log-every-n-steps", str(max(1, steps // LOGS_EACH))]

    def in_turns() -> dict[str, Any]:
        rates: dict[str, list[float]] = {title: [] for title in argvs}
        for repetition in range(measure.repetitions):
            for title, argv in argvs.items():
                rates[title].append(_images_per_second(title, argv, study.folder / "measured", threads))
            shown = ", ".join(f"{title} {values[-1]:.0f}" for title, values in rates.items())
            log(f"images/s, repetition {repetition + 1} of {measure.repetitions}: {shown}")
        device = str(training.default_device())
        each = f", {threads} thread{'s' if threads > 1 else ''} for each run" if device == "cpu" else ""
        return {"machine": machine_facts(device)["device"] + each, "rates": rates}

    # A speed depends on which variants it was in turns with.
    found = cached(study.folder / "speed.json", [list(argvs.items()), threads, measure.repetitions], in_turns)
    rates = {one.name: [found["rates"][title] for title in _titles(one)] for one in comparison.variants}
    return Speeds(found["machine"], rates)


def _titles(variant: Variant) -> list[str]:
    """For people, of each stage."""
    if len(variant.stages) == 1:
        return [variant.name]
    return [f"{variant.name} at {stage.resolution} px" for stage in variant.stages]


def _images_per_second(title: str, argv: Sequence[str], scratch: Path, threads: int) -> float:
    shutil.rmtree(scratch, ignore_errors=True)
    argv = ["train", *argv, "--logs", str(scratch), "--name", "run"]
    list(run_all([Command.ov2(f"measuring {title}", argv, scratch / "out.txt")], 1, threads))
    rows = [row for row in read_results(scratch / "run") if row["kind"] == "train"]
    shutil.rmtree(scratch)
    return rate_of(rows)


def rate_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Images/s from the second log step to the last, by the clock."""
    first, last = rows[1], rows[-1]
    return float((last["samples_seen"] - first["samples_seen"]) / (last["time"] - first["time"]))


def measure_costs(study: Study, comparison: Comparison, log: Log) -> Costs:
    """The cost of a step of each variant, at its own batch size. Raises UserError, RunFailed."""
    file, largest, out = study.folder / "costs.json", comparison.measure.largest_batch, {}
    for variant in comparison.variants:
        with naming(f"{comparison.name}: variant {variant.name}"):
            job = job_of(study, comparison, variant)
            out[variant.name] = measure_cost(job, global_batch(comparison, variant), largest, file, log)
    return out


def job_of(study: Study, comparison: Comparison, variant: Variant) -> Job:
    """What `ov2 bench` measures of a variant: its last stage. Captions are drawn from the vocabulary of the first
    ov2 model of the comparison, or from OpenCLIP's own. Raises UserError."""
    measure, last = comparison.measure, variant.stages[-1]
    argv = train_argv(study, comparison, variant, [(last.resolution, global_batch(comparison, variant))])
    device = "cpu" if value_of(argv, "--device") == "cpu" else str(training.default_device())
    if measure.largest_batch and device == "cpu" and measure.memory_limit_gb is None:
        raise UserError("[measure] largest-batch: on a CPU it needs memory-limit-gb, the memory that a batch may use")
    return Job(
        name=variant.name,
        argv=tuple(without(argv, TASKS)),
        captions_of=next((v.model for v in comparison.variants if training.is_ov2_model(v.model)), STOCK_VOCABULARY),
        device=device,
        lengths=measure.lengths,
        memory_limit_gb=measure.memory_limit_gb,
        threads=threads_each(study.at_once) if device == "cpu" else None,
    )


def measure_cost(job: Job, batch: int, with_largest: bool, file: Path, log: Log) -> Cost:
    """Step memory and, if asked for, the largest batch. Raises UserError if the job's own does not fit; RunFailed."""
    unlimited = replace(job, memory_limit_gb=None)
    plain = asdict(replace(unlimited, name=""))  # variants that differ in name alone cost the same

    def memory() -> float:
        found = step_memory(unlimited)
        if found is None:
            raise UserError(f"a batch of {batch:,} does not fit into memory; give all variants a smaller batch-size")
        log(f"step memory of {job.name}: {found / MIB:,.0f} MiB")
        return found / MIB

    step_memory_mb = cached(file, ["step memory", plain], memory)
    if not with_largest:
        return Cost(step_memory_mb)
    what = ["largest batch", plain, job.memory_limit_gb]
    return Cost(step_memory_mb, cached(file, what, lambda: largest_batch(job, batch, log)))

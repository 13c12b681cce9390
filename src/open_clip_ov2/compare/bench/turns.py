"""The measurements of `ov2 bench`: variants in turns, each in a process of its own; and the largest batch of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from open_clip_ov2.compare.bench.bench_report import Largest, Measured, Results
from open_clip_ov2.compare.bench.settings import BenchSettings, Case, Job, model_of
from open_clip_ov2.compare.bench.variant import OutOfMemory, Variant

OUT_OF_MEMORY = "out of memory"
MOST_IMAGES = 1 << 16  # of a batch that is looked for, ours: beyond what one device holds of any of these models
BATCH_STEP = 8  # images; tensor cores want multiples of 8


def run_bench(settings: BenchSettings, log: Callable[[str], None]) -> Iterator[Results]:
    """Yields all results after each case and each largest batch, so that an interrupted benchmark leaves what it found.

    Raises UserError, RunFailed.
    """
    results = Results((), (), {}, {})
    for case in settings.cases:
        turns = Turns(settings, case, results, log)
        measured = (*results.measured, *turns.run())
        results = replace(results, measured=measured, peak_flops=turns.peaks, machine=turns.machine)
        yield results
    if not settings.largest_batch:
        return
    for case in {(case.resolution, case.precision): case for case in settings.cases}.values():
        for variant in settings.variants:
            size = largest_batch(settings.job(variant, case), case.batch_size, log)
            found = Largest(variant, case.resolution, case.precision, size)
            results = replace(results, largest=(*results.largest, found))
            yield results


class Turns:
    """All variants in one case."""

    def __init__(self, settings: BenchSettings, case: Case, before: Results, log: Callable[[str], None]) -> None:
        self.settings, self.case, self.log = settings, case, log
        self.peaks, self.machine = dict(before.peak_flops), before.machine
        self.measured = {name: Measured(name, model_of(name, settings.model), case) for name in settings.variants}
        self._running: dict[str, Variant] = {}

    def run(self) -> list[Measured]:
        case, names = self.case, self.settings.variants
        self.log(f"{case.resolution} px, {case.precision}, batch {case.batch_size}: {', '.join(names)}")
        with contextlib.ExitStack() as stack:
            for name in names:  # all models are built side by side
                self._running[name] = stack.enter_context(Variant(self.settings.job(name, case)))
            for step in (self._wait, self._memory):  # nothing is measured while another one still builds
                for name in names:
                    self._if_it_fits(name, step)
            for repetition in range(self.settings.repetitions):
                first = repetition % len(names)  # no variant always follows the same other one
                for name in names[first:] + names[:first]:
                    self._if_it_fits(name, self._time)
                times = (f"{name} {1e3 * one.step_s[-1]:.0f} ms" for name, one in self.measured.items() if one.step_s)
                self.log(f"  {repetition + 1} of {self.settings.repetitions}: {', '.join(times) or OUT_OF_MEMORY}")
        return list(self.measured.values())

    def _if_it_fits(self, name: str, step: Callable[[str, Variant], None]) -> None:
        if name not in self._running:
            return
        try:
            step(name, self._running[name])
        except OutOfMemory:
            del self._running[name]
            self.measured[name] = Measured(name, self.measured[name].model, self.case, failure=OUT_OF_MEMORY)

    def _wait(self, name: str, variant: Variant) -> None:
        self.measured[name] = replace(self.measured[name], **variant.facts)

    def _memory(self, name: str, variant: Variant) -> None:
        if self.case.precision not in self.peaks:
            found = variant.ask("peak")
            self.peaks[self.case.precision], self.machine = found["flops"], found["machine"]
        memory = variant.ask("memory")
        self.measured[name] = replace(self.measured[name], **memory)
        self.log(f"  {name}: step memory {memory['step_bytes'] / 1e6:,.4g} MB")

    def _time(self, name: str, variant: Variant) -> None:
        found, one = variant.ask("time", self.settings.steps), self.measured[name]
        step_s, cpu_s = (*one.step_s, found["step_s"]), (*one.cpu_s, found["cpu_s"])
        self.measured[name] = replace(one, step_s=step_s, cpu_s=cpu_s)


def step_memory(job: Job) -> int | None:
    """Bytes that a step takes above weights, gradients and optimizer state; None if it does not fit into memory."""
    with Variant(job) as variant:
        try:
            return int(variant.ask("memory")["step_bytes"])
        except OutOfMemory:
            return None


def largest_batch(job: Job, start: int, log: Callable[[str], None]) -> int:
    """The largest batch that trains, 0 if none does; `start` is tried first.

    One process tries sizes as long as they fit; after one that did not, a fresh process takes its place.
    """
    variants: list[Variant] = []

    def fits(batch_size: int) -> bool:
        try:
            variants[:] = variants or [Variant(job)]
            fitting = bool(variants[0].ask("fits", batch_size))
        except OutOfMemory:
            variants.clear()
            fitting = False
        log(f"  {job.name}, batch {batch_size}: {'fits' if fitting else 'too large'}")
        return fitting

    try:
        return largest(fits, start, BATCH_STEP, MOST_IMAGES)
    finally:
        for variant in variants:
            variant.close()


def largest(fits: Callable[[int], bool], start: int, step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` for which `fits` holds, by doubling and bisection; 0 if none does.

    `fits` must be true up to some size and false beyond. `start` is tried first. Asks about 2 log2(result / step)
    times, and never about more than twice what fits, or than `start`.
    """
    if not 1 <= step <= most:
        raise ValueError(f"step {step}: expected a number from 1 to {most}")
    ceiling = most // step
    low, high = 0, ceiling + 1  # in steps: low fits (0 always does), high does not
    size = min(max(1, start // step), ceiling)
    while high - low > 1:
        if fits(size * step):
            low = size
        else:
            high = size
        size = min(2 * low, ceiling) if high > ceiling else (low + high) // 2
    return low * step

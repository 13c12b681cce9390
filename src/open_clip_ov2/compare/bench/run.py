"""Takes the measurements: contenders in turns, each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from open_clip_ov2.compare.bench.bench_results import Largest, Measured, Results
from open_clip_ov2.compare.bench.cases import BenchSettings, Case, Job
from open_clip_ov2.compare.bench.client import Client, OutOfMemory
from open_clip_ov2.compare.bench.search import largest

OUT_OF_MEMORY = "out of memory"
MOST_IMAGES = 1 << 16  # of a batch that is looked for, ours: beyond what one device holds of any of these models
BATCH_STEP = 8  # images; tensor cores want multiples of 8


def run_bench(settings: BenchSettings, say: Callable[[str], None]) -> Iterator[Results]:
    """All that is known after each case and each largest batch, so that what ends early leaves what it had found.

    Raises UserError, RunFailed.
    """
    results = Results((), (), {}, {})
    for case in settings.cases:
        turns = _Turns(settings, case, results, say)
        measured = (*results.measured, *turns.run())
        results = replace(results, measured=measured, peak_flops=turns.peaks, machine=turns.machine)
        yield results
    for case in _unlike(settings.cases) if settings.largest_batch else ():
        for arm in settings.arms:
            size = largest_batch(settings.job(arm, case), say)
            found = Largest(arm, case.resolution, case.precision, size)
            results = replace(results, largest=(*results.largest, found))
            yield results


def _unlike(cases: tuple[Case, ...]) -> list[Case]:
    """One case of each resolution and precision."""
    return list({(case.resolution, case.precision): case for case in reversed(cases)}.values())[::-1]


class _Turns:
    """All arms in one case."""

    def __init__(self, settings: BenchSettings, case: Case, before: Results, say: Callable[[str], None]) -> None:
        self.settings, self.case, self.say = settings, case, say
        self.peaks, self.machine = dict(before.peak_flops), before.machine
        self.clients: dict[str, Client] = {}
        self.measured: dict[str, Measured] = {}

    def run(self) -> list[Measured]:
        case = self.case
        self.say(f"{case.resolution} px, {case.precision}, batch {case.batch_size}: {', '.join(self.settings.arms)}")
        with contextlib.ExitStack() as stack:
            jobs = {arm: self.settings.job(arm, case) for arm in self.settings.arms}
            clients = {arm: stack.enter_context(Client(job)) for arm, job in jobs.items()}  # they build side by side
            for arm, client in clients.items():
                self.measured[arm] = Measured(arm, client.job.model, case)
                try:
                    client.wait()  # nothing is measured while another still builds
                except OutOfMemory:
                    self._failed(arm)
            for arm, client in clients.items():
                if not self.measured[arm].failure:
                    self._begin(arm, client)
            for repetition in range(self.settings.repetitions):
                first = repetition % len(self.settings.arms)  # none always comes after the same other one
                for arm in self.settings.arms[first:] + self.settings.arms[:first]:
                    self._time(arm)
                self._say_repetition(repetition)
        return list(self.measured.values())

    def _begin(self, arm: str, client: Client) -> None:
        try:
            if self.case.precision not in self.peaks:
                found = client.ask("peak")
                self.peaks[self.case.precision], self.machine = found["flops"], found["machine"]
            memory = client.ask("memory")
        except OutOfMemory:
            self._failed(arm)
            return
        self.clients[arm] = client
        self.measured[arm] = replace(self.measured[arm], **client.about, **memory)
        self.say(f"  {arm}: step memory {memory['step_bytes'] / 1e6:,.4g} MB")

    def _time(self, arm: str) -> None:
        if arm not in self.clients:
            return
        try:
            found = self.clients[arm].ask("time", self.settings.steps)
        except OutOfMemory:
            self._failed(arm)
            return
        one = self.measured[arm]
        self.measured[arm] = replace(one, step_s=(*one.step_s, found["step_s"]), cpu_s=(*one.cpu_s, found["cpu_s"]))

    def _failed(self, arm: str) -> None:
        self.clients.pop(arm, None)
        one = self.measured[arm]
        self.measured[arm] = Measured(arm, one.model, self.case, failure=OUT_OF_MEMORY)

    def _say_repetition(self, repetition: int) -> None:
        times = ", ".join(f"{arm} {1e3 * one.step_s[-1]:.0f} ms" for arm, one in self.measured.items() if one.step_s)
        self.say(f"  {repetition + 1} of {self.settings.repetitions}: {times or OUT_OF_MEMORY}")


def step_memory(job: Job) -> int | None:
    """Bytes that a step takes above weights, gradients and optimizer state; None where memory does not suffice."""
    with Client(job) as client:
        try:
            return int(client.ask("memory")["step_bytes"])
        except OutOfMemory:
            return None


def largest_batch(job: Job, say: Callable[[str], None]) -> int:
    """The largest that trains, from the job's own on; 0: none. A process goes on as long as batches fit; after one that
    did not, a fresh one takes its place."""
    clients = list[Client]()

    def fits(batch_size: int) -> bool:
        try:
            if not clients:
                clients.append(Client(job))
            fitting = bool(clients[-1].ask("fits", batch_size)["fits"])
        except OutOfMemory:
            clients.clear()
            fitting = False
        say(f"  {job.arm} at {job.case.resolution} px, batch {batch_size}: {'fits' if fitting else 'too large'}")
        return fitting

    try:
        return largest(fits, job.case.batch_size, BATCH_STEP, MOST_IMAGES)
    finally:
        for client in clients:
            client.close()

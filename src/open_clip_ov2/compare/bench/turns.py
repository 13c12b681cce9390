"""The measurements of `ov2 bench`: variants in turns, each in a process of its own; and the largest batch of each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from open_clip_ov2.compare.bench.bench_report import MB, add_figures, new_row
from open_clip_ov2.compare.bench.measured_step import MeasuredStep
from open_clip_ov2.compare.bench.settings import BenchSettings, Case, Job
from open_clip_ov2.errors import RunFailed, UserError, first_line

OUT_OF_MEMORY = "out of memory"
MOST_IMAGES = 1 << 16  # of a batch that is looked for, ours: beyond what one device holds of any of these models
BATCH_STEP = 8  # images; tensor cores want multiples of 8
CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
END_S = 10.0  # a process that is asked to end does so at once; after this it is killed
Log = Callable[[str], None]


def run_bench(settings: BenchSettings, log: Log) -> Iterator[dict[str, Any]]:
    """Yields the document of bench.json, all but the command and its date, after each case and each largest batch, so
    that an interrupted benchmark leaves what it found. Raises UserError, RunFailed."""
    plain = asdict(settings)
    plain = {"arms": plain.pop("variants"), **plain}
    found: dict[str, Any] = {
        "machine": {}, "settings": plain, "peak_flops": {}, "measured": [], "largest_batch": []
    }  # fmt: skip
    for case in settings.cases:
        _measure(found, settings, case, log)
        yield found
    if not settings.largest_batch:
        return
    for case in {(case.resolution, case.precision): case for case in settings.cases}.values():
        for variant in settings.variants:
            size = largest_batch(settings.job(variant, case), case.batch_size, log)
            found["largest_batch"].append({"arm": variant, **asdict(replace(case, batch_size=size))})
            yield found


def _measure(found: dict[str, Any], settings: BenchSettings, case: Case, log: Log) -> None:
    """Add all variants in one case."""
    names, peaks = settings.variants, found["peak_flops"]
    rows = {name: new_row(name, settings, case) for name in names}
    log(f"{case.resolution} px, {case.precision}, batch {case.batch_size}: {', '.join(names)}")
    with contextlib.ExitStack() as stack:
        # All models are built side by side.
        running = {name: stack.enter_context(Variant(settings.job(name, case))) for name in names}

        def ask(name: str, method: str, *arguments: Any) -> dict[str, Any]:
            """Empty for a variant that does not fit into memory."""
            if rows[name]["failure"]:
                return {}
            try:
                return dict(running[name].ask(method, *arguments))
            except OutOfMemory:
                rows[name] = new_row(name, settings, case, OUT_OF_MEMORY)
                return {}

        for name in names:  # nothing is measured while another one still builds
            rows[name].update(ask(name, "facts"))
        for name in names:
            if memory := ask(name, "memory"):
                rows[name].update(memory)
                log(f"  {name}: step memory {memory['step_bytes'] / MB:,.4g} MB")
            if case.precision not in peaks and (device := ask(name, "peak")):
                peaks[case.precision], found["machine"] = device["flops"], device["machine"]
        for repetition in range(settings.repetitions):
            first = repetition % len(names)  # no variant always follows the same other one
            for name in names[first:] + names[:first]:
                for key, seconds in ask(name, "time", settings.steps).items():
                    rows[name][key].append(seconds)
            times = (f"{name} {1e3 * row['step_s'][-1]:.0f} ms" for name, row in rows.items() if row["step_s"])
            log(f"  {repetition + 1} of {settings.repetitions}: {', '.join(times) or OUT_OF_MEMORY}")
    add_figures(rows.values(), peaks.get(case.precision, 0.0))
    found["measured"] += rows.values()


def step_memory(job: Job) -> int | None:
    """Bytes that a step takes above weights, gradients and optimizer state; None if it does not fit into memory."""
    with Variant(job) as variant:
        try:
            return int(variant.ask("memory")["step_bytes"])
        except OutOfMemory:
            return None


def largest_batch(job: Job, start: int, log: Log) -> int:
    """The largest batch that trains, 0 if none does; `start` is tried first."""
    with Variant(job) as variant:

        def fits(batch_size: int) -> bool:
            try:
                fitting = bool(variant.ask("fits", batch_size))
            except OutOfMemory:
                fitting = False
            log(f"  {job.name}, batch {batch_size}: {'fits' if fitting else 'too large'}")
            return fitting

        return largest(fits, start, BATCH_STEP, MOST_IMAGES)


def largest(fits: Callable[[int], bool], start: int, step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` for which `fits` holds, by doubling and bisection; 0 if none does.
    `start` is tried first. Never asks about more than twice what fits, or than `start`."""
    ceiling = most // step
    low, size = 0, min(max(1, start // step), ceiling)  # in steps; `low` fits
    while low < size and fits(size * step):
        low, size = size, min(2 * size, ceiling)
    between = range(low + 1, size)  # `size` does not fit, or is `low`
    return step * (low + bisect_left(between, True, key=lambda steps: not fits(steps * step)))


class OutOfMemory(Exception):
    """The variant did not fit into memory."""


class Variant(contextlib.AbstractContextManager["Variant"]):
    """A job's process. After an error it ends, and the next question starts a fresh one: what an allocator holds after
    it ran out of memory says nothing of a process that did not."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._connection, theirs = CONTEXT.Pipe()
        self._process: Any = CONTEXT.Process(target=_serve, args=(self.job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of that method of the process's MeasuredStep. Raises UserError for a model that cannot be built,
        OutOfMemory, and RunFailed if the process ended for another reason."""
        if self._connection.closed:
            self._start()
        with contextlib.suppress(OSError):  # the process has ended; its last message says why
            self._connection.send((method, arguments))
        try:
            value = self._connection.recv()
        except (EOFError, OSError):
            status = self.close()
            if status == -signal.SIGKILL:  # what Linux does to a process that takes too much memory
                raise OutOfMemory from None
            message = f"{self.job.name}: its process ended with exit status {status}; its messages stand above"
            raise RunFailed(message) from None
        if isinstance(value, Exception):
            self.close()
            raise value
        return value

    def close(self) -> int | None:
        """End the process; its exit status."""
        self._connection.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _serve(job: Job, connection: Connection) -> None:
    """The process: sends what a method returned, or the exception that ended it."""
    os.dup2(2, 1)  # stdout is the command's table
    try:
        step = MeasuredStep(job)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(step, method)(*arguments))
    except (EOFError, KeyboardInterrupt):
        return  # the other side is done
    except UserError as error:
        connection.send(error)
    except Exception as error:
        # The last is the message of torch's allocator on a CPU.
        full = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        connection.send(OutOfMemory() if full else RunFailed(f"{job.name} failed: {first_line(error)}"))
        if not full:
            raise

"""`ov2` commands side by side, each in a process of its own, with its own log and threads.

The processes are forked from a server that has imported PyTorch and OpenCLIP: a study starts hundreds of short ones,
and these imports take ten seconds of a core. The server itself uses no device and no model.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from open_clip_ov2.compare.bench.settings import cores
from open_clip_ov2.errors import UserError

POLL_S = 0.1
STOP_S = 60  # a run that is stopped saves a checkpoint first
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Command:
    """`python -m MODULE ARGV`; `title` is for people; what the command prints goes to `log`."""

    title: str
    module: str
    argv: tuple[str, ...]
    log: Path

    @classmethod
    def ov2(cls, title: str, argv: Sequence[str], log: Path) -> Command:
        return cls(title, "open_clip_ov2", tuple(argv), log)

    def start(self, threads: int) -> BaseProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")  # a process that ends before it writes has no output, and not an earlier one's
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # and with it the package, PyTorch and OpenCLIP
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the server has it: it alone learns how runs end
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGTERM, before)
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        process = context.Process(target=_run, args=(self, threads, environment))
        process.start()
        return process

    def failure(self, status: int) -> UserError:
        """With the last line that it printed, without ov2's prefix."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("ov2: error: ") if lines else "no output"
        return UserError(f"{self.title}: {last} (exit status {status}; its output: {self.log})")


def _run(command: Command, threads: int, environment: Mapping[str, str]) -> None:
    """The command, in a process that was forked: what a new one would have of its parent, and no more."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it was stopped while the server was importing
        return
    multiprocessing.set_start_method(None, force=True)  # Python's default, for data workers
    with command.log.open("wb") as log, open(os.devnull, "rb") as nothing:
        for ours, theirs in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours.fileno(), theirs)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    sys.argv[1:] = command.argv
    try:
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def threads_each(at_once: int) -> int:
    return max(1, cores() // at_once)


def run_all(commands: Sequence[Command], at_once: int, threads: int | None = None) -> Iterator[tuple[Command, float]]:
    """Runs `at_once` of them, in order, and yields each that has ended, with its seconds. The first that fails stops
    the others (runs save a checkpoint) and is a UserError with its last line."""
    waiting, going = list(commands), dict[Command, tuple[BaseProcess, float]]()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                command = waiting.pop(0)
                going[command] = (command.start(threads or threads_each(at_once)), time.monotonic())
            time.sleep(POLL_S)
            for command, (process, begun) in list(going.items()):
                if process.exitcode is None:
                    continue
                del going[command]
                if process.exitcode:
                    raise command.failure(process.exitcode)
                yield command, time.monotonic() - begun
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            process.join(STOP_S)
            process.kill()
            process.join()
        signal.signal(signal.SIGTERM, before)

"""Commands side by side, each with its own log and its own threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.compare.bench.settings import cores
from open_clip_ov2.errors import UserError

POLL_S = 0.1
STOP_S = 60  # a run that is stopped saves a checkpoint first


@dataclass(frozen=True)
class Command:
    """`argv` of `ov2`, or a whole command line; `title` is for people; what the command prints goes to `log`."""

    title: str
    argv: tuple[str, ...]
    log: Path

    @classmethod
    def ov2(cls, title: str, argv: Sequence[str], log: Path) -> Command:
        return cls(title, (sys.executable, "-m", "open_clip_ov2", *argv), log)

    def start(self, threads: int) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with self.log.open("wb") as log:
            environment = {**os.environ, **counts}
            return subprocess.Popen(self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def failure(self, status: int) -> UserError:
        """With the last line that it printed, without ov2's prefix."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("ov2: error: ") if lines else "no output"
        return UserError(f"{self.title}: {last} (exit status {status}; its output: {self.log})")


def threads_each(at_once: int) -> int:
    return max(1, cores() // at_once)


def run_all(commands: Sequence[Command], at_once: int, threads: int | None = None) -> Iterator[tuple[Command, float]]:
    """Runs `at_once` of them, in order, and yields each that has ended, with its seconds. The first that fails stops
    the others (runs save a checkpoint) and is a UserError with its last line."""
    waiting, going = list(commands), dict[Command, tuple[subprocess.Popen[bytes], float]]()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    try:
        while waiting or going:
            while waiting and len(going) < at_once:
                command = waiting.pop(0)
                going[command] = (command.start(threads or threads_each(at_once)), time.monotonic())
            time.sleep(POLL_S)
            for command, (process, begun) in list(going.items()):
                if process.poll() is None:
                    continue
                del going[command]
                if process.returncode:
                    raise command.failure(process.returncode)
                yield command, time.monotonic() - begun
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)

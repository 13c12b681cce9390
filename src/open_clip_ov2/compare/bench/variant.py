"""One variant in a process of its own, held open while the variants take turns.

A variant that runs out of memory leaves its process: what its allocator holds afterwards says nothing of a fresh one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch

from open_clip_ov2.compare.bench.measured_step import MeasuredStep
from open_clip_ov2.compare.bench.settings import Job
from open_clip_ov2.errors import RunFailed, UserError, first_line

END_S = 10.0  # a process that is asked to end does so at once; after this it is killed


class OutOfMemory(Exception):
    """The variant did not fit into memory. Its process has ended."""


class Variant:
    """A job's process, which builds its model in the background. `ask` calls a method of its MeasuredStep.

    Raises UserError for a model that cannot be built, OutOfMemory, and RunFailed if the process ended for another
    reason.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._facts: dict[str, Any] | None = None

    def __enter__(self) -> Variant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def facts(self) -> dict[str, Any]:
        """MeasuredStep.facts, once the model is built."""
        if self._facts is None:
            self._facts = self._reply()
        return self._facts

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of that method of the process's MeasuredStep."""
        assert self.facts
        with contextlib.suppress(OSError):  # the process has ended: `_reply` says why
            self._connection.send((method, arguments))
        return self._reply()

    def _reply(self) -> Any:
        try:
            value = self._connection.recv()
        except (EOFError, OSError):
            value = None
        if value is not None and not isinstance(value, Exception):
            return value
        status = self.close()
        if isinstance(value, Exception):
            raise value
        if status == -signal.SIGKILL:  # what Linux does to a process that takes too much memory
            raise OutOfMemory
        raise RunFailed(f"{self.job.name}: its process ended with exit status {status}; its messages stand above")

    def close(self) -> int | None:
        """End the process; its exit status."""
        self._connection.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _serve(job: Job, connection: Connection) -> None:
    """The process: what a method returned, or the exception that ended it."""
    os.dup2(2, 1)  # stdout is the command's table
    try:
        step = MeasuredStep(job)
        connection.send(step.facts())
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(step, method)(*arguments))
    except (EOFError, KeyboardInterrupt):
        return  # the other side is done
    except UserError as error:
        connection.send(error)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        connection.send(OutOfMemory())
    except Exception as error:
        full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU allocator's message
        connection.send(OutOfMemory() if full else RunFailed(f"{job.name} failed: {first_line(error)}"))
        if not full:
            raise

"""Stop signals, and how all ranks agree to stop or save at the same step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

STOP_SIGNALS = ("SIGUSR2", "SIGTERM", "SIGINT")  # SLURM's preemption as submitit sets it; scancel; Ctrl-C


class StopSignals:
    """While entered, a signal sets `name` and does nothing else; a second Ctrl-C interrupts at once.

    Outside the main thread signals cannot be caught: then nothing is installed.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _frame: object) -> None:
        if os.getpid() != self._pid:
            return  # a forked child has inherited the handler, not the run
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Agreement:
    """The largest value of each flag over all ranks, known one step late so that no step waits for it.

    Every rank must call `exchange` equally often.
    """

    def __init__(self, world_size: int, device: torch.device, flags: int) -> None:
        self._world_size = world_size
        self._device = device
        self._flags = flags
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, flags: list[int]) -> list[int]:
        """Give this rank's flags; get what all ranks gave at the call before (alone: at this one)."""
        if self._world_size == 1:
            return flags
        agreed = self.close()
        value = torch.tensor(flags, dtype=torch.int32, device=self._device)
        work = torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = (value, work)
        return agreed

    def now(self, flag: bool) -> bool:
        """Whether the flag is true on any rank, now."""
        if self._world_size == 1:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value.item())

    def close(self) -> list[int]:
        """Wait for the exchange that has begun, and get what all ranks gave. Every rank must call it."""
        if self._pending is None:
            return [0] * self._flags
        value, work = self._pending
        work.wait()
        self._pending = None
        return [int(flag) for flag in value.tolist()]


def on_rank_0(rank: int, world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function on rank 0. Its result is returned, or its exception raised, on every rank."""
    box: list[Any] = [(None, None)]
    if rank == 0:
        try:
            box = [(function(*arguments), None)]
        except Exception as error:
            box = [(None, error)]
    if world_size > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    value, problem = box[0]
    if problem is not None:
        raise problem
    return value

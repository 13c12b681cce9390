"""Stop signals, and how all ranks agree to stop or save at the same step."""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

WAIT = datetime.timedelta(hours=2)
STOP_SIGNALS = ("SIGUSR2", "SIGTERM", "SIGINT")  # SLURM's preemption as submitit sets it; scancel; Ctrl-C


class StopSignals:
    """While entered, a signal sets `name` and does nothing else; a second Ctrl-C interrupts at once. Outside the main
    thread signals cannot be caught: then nothing is installed."""

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
    """The largest value of each flag over all ranks, known one step late so that no step waits for it. Every rank must
    call `exchange` equally often."""

    def __init__(self, world_size: int, device: torch.device, flags: int) -> None:
        self._world_size, self._device, self._flags = world_size, device, flags
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


def waiting_group(world_size: int) -> Any:
    """For `on_rank_0`: all ranks, which wait for each other for as long as rank 0 may take to copy a run from a store;
    NCCL's own groups give up after ten minutes. None for one process."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT) if world_size > 1 else None


def first_of_all(group: Any, text: str) -> str:
    """The first text of all ranks of the group that is not empty, and whose it is."""
    found = [text]
    if group is not None:
        found = [""] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, text, group=group)
    return next((f"{one} on rank {rank}" for rank, one in enumerate(found) if one), "")


def on_rank_0(rank: int, group: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function on rank 0. Its result is returned, or its exception raised, on every rank of the group."""
    box: list[Any] = [(None, None)]
    if rank == 0:
        try:
            box = [(function(*arguments), None)]
        except Exception as error:
            box = [(None, error)]
    if group is not None:
        torch.distributed.broadcast_object_list(box, src=0, group=group)
    value, problem = box[0]
    if problem is not None:
        raise problem
    return value

"""One or several processes for what is not training: OpenCLIP's own start-up, and an end in any case."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from open_clip_train.distributed import init_distributed_device


@dataclass(frozen=True)
class Processes:
    """`device` of this one, and its place among all."""

    device: torch.device
    rank: int
    world_size: int


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """A process group under torchrun or srun, alone otherwise."""
    place = argparse.Namespace(device=device)
    found = init_distributed_device(place)
    try:
        yield Processes(found, int(place.rank), int(place.world_size))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

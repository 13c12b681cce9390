"""One or several processes for what is not training: OpenCLIP's own start-up, and a clean end in any case."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch
from open_clip_train.distributed import init_distributed_device

from open_clip_ov2.errors import UserError


def default_device(device: str | None = None) -> torch.device:
    """The device of this name; by default a GPU if there is one. Raises UserError."""
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"{device}: not a device of torch; give cpu, cuda or cuda:N") from error


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[tuple[torch.device, int]]:
    """A process group under torchrun or srun, one process otherwise: this one's device, and how many there are."""
    place = argparse.Namespace(device=str(default_device(device)))
    found = init_distributed_device(place)
    try:
        yield found, int(place.world_size)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

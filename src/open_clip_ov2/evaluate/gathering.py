"""What all processes of an evaluation have, put together: the same on any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from open_clip_ov2.data.skips import merge_counts

Value = TypeVar("Value")


def place() -> tuple[int, int]:
    """The rank of this process among all of torch.distributed, and how many they are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def all_gathered(mine: Value) -> list[Value]:
    """What every process has, in the order of their ranks."""
    _, world_size = place()
    everyone: list[Any] = [mine] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


def gathered(rows: Mapping[int, Value]) -> dict[int, Value]:
    """Results by a sample's place in file order (`Batch.indices`) from all processes, in that order; every process gets
    all. Raises ValueError if a sample was evaluated twice."""
    parts = all_gathered(rows)
    merged = {index: value for part in parts for index, value in part.items()}
    if len(merged) != sum(map(len, parts)):
        raise ValueError("two processes evaluated the same sample")
    return {index: merged[index] for index in sorted(merged)}


def gathered_keys(keys: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Keys of skipped samples by cause, sorted."""
    parts = all_gathered(keys)
    causes = sorted({cause for part in parts for cause in part})
    return {cause: sorted(key for part in parts for key in part.get(cause, ())) for cause in causes}


def gathered_counts(counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, summed."""
    return merge_counts(all_gathered(counts))

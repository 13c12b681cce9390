"""Throughput since the last log step, and memory."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor


class Window:
    """Sums over the steps since the last `take`; nothing is waited for before that."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._images = 0
        self._tokens: list[Tensor | float] = []
        self._wait_s = 0.0
        self._step_s = 0.0

    def add(self, images: int, tokens: Tensor | float | None, wait_s: float, step_s: float) -> None:
        self._images += images
        self._wait_s += wait_s
        self._step_s += step_s
        if tokens is not None:
            self._tokens.append(tokens)

    def take(self) -> dict[str, float]:
        """images_per_second, tokens_per_second (real caption tokens) and data_wait_share (0 to 1)."""
        seconds = max(self._step_s, 1e-9)
        out = {"images_per_second": self._images / seconds, "data_wait_share": self._wait_s / seconds}
        if self._tokens:
            out["tokens_per_second"] = sum(float(count) for count in self._tokens) / seconds
        self._clear()
        return out


def peak_memory_mb(device_type: str) -> float:
    """MiB: the most that torch has held on the GPU, or this process's largest resident set."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux

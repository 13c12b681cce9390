"""Throughput and utilisation since the last log step, and memory."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from open_clip_ov2.tracking.throughput import Meter


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

    def add_seconds(self, seconds: float) -> None:
        """Steps that a GPU still had to do when the last one was added."""
        self._step_s += seconds

    @property
    def seconds(self) -> float:
        return max(self._step_s, 1e-9)

    def take(self, meter: Meter | None = None) -> dict[str, float]:
        """images_per_second, tokens_per_second (real caption tokens), data_wait_share (0 to 1) and, with a meter,
        utilisation (model FLOPs over the devices' dense rate, 0 to 1)."""
        seconds = self.seconds
        out = {"images_per_second": self._images / seconds, "data_wait_share": self._wait_s / seconds}
        tokens = sum(float(count) for count in self._tokens) if self._tokens else None
        if tokens is not None:
            out["tokens_per_second"] = tokens / seconds
        if meter is not None:
            out["utilisation"] = meter.utilisation(self._images, tokens, seconds)
        self._clear()
        return out


def peak_memory_mb(device_type: str) -> float:
    """MiB: the most that torch has held on the GPU, or this process's largest resident set."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux

"""How well a run uses its devices, and what slows it down.

MFU (model FLOPs utilization, PaLM, arXiv 2204.02311, appendix B): the FLOPs of the model's forward and backward pass
over what the devices could have computed in the same time at their dense matrix rate.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Ours: a data pipeline that keeps up costs less than a few percent of the time, so a fifth deserves a warning.
WAIT_SHARE = 0.2
# Ours: a GPU below this MFU with less than this share of its memory used gets too little work at once.
LOW_MFU, LOW_MEMORY = 0.2, 0.5
JUDGED_S = 30.0  # ours: steps are judged together over this time, because a single slow batch is not a bottleneck


@dataclass(frozen=True)
class Meter:
    """`image_flops`: model FLOPs (forward and backward) of an image, by the number of real target tokens of its caption
    (None: the model's whole context). `peak_flops`: FLOP/s of all devices of the run together.
    """

    image_flops: Callable[[float | None], float]
    peak_flops: float

    def mfu(self, images: float, tokens: float | None, seconds: float) -> float:
        """0 to 1. Padding, dropped image tokens and what checkpointing recomputes do not count as work."""
        mean = None if tokens is None else tokens / max(images, 1.0)
        return images * self.image_flops(mean) / (max(seconds, 1e-9) * self.peak_flops)


@dataclass
class Window:
    """Sums over some steps. Tensors are read, and so waited for, in `rates` only."""

    images: int = 0
    wait_s: float = 0.0
    step_s: float = 0.0
    tokens: list[Tensor | float] = field(default_factory=list)

    def add(self, images: int, tokens: Tensor | float | None, wait_s: float, step_s: float) -> None:
        self.images += images
        self.wait_s += wait_s
        self.step_s += step_s
        if tokens is not None:
            self.tokens.append(tokens)

    def rates(self, meter: Meter | None = None) -> dict[str, float]:
        """images_per_second, data_wait_share (0 to 1), tokens_per_second (real caption tokens, if they are counted)
        and, with a meter, mfu (0 to 1)."""
        seconds = max(self.step_s, 1e-9)
        out = {"images_per_second": self.images / seconds, "data_wait_share": self.wait_s / seconds}
        tokens = sum(float(count) for count in self.tokens) if self.tokens else None
        if tokens is not None:
            out["tokens_per_second"] = tokens / seconds
        if meter is not None:
            out["mfu"] = meter.mfu(self.images, tokens, seconds)
        return out


class PeakMemory(NamedTuple):
    """`peak_mb`: MiB, the most that torch has held on the GPU, or on a CPU this process's largest resident set.
    `share`: that of the GPU's memory; 1 on a CPU, which has none of its own to fill."""

    peak_mb: float
    share: float = 1.0


def peak_memory(device_type: str) -> PeakMemory:
    if device_type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        return PeakMemory(
            peak / 2**20, peak / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return PeakMemory(resident / (2**20 if sys.platform == "darwin" else 2**10))  # bytes on macOS, KiB on Linux


def bottleneck(wait_share: float, mfu: float | None, memory: float, workers: int | None) -> tuple[str, str] | None:
    """(cause, one line that says what to do), or None if nothing stands out. `memory`: the share that is used."""
    if wait_share > WAIT_SHARE:
        now = "" if workers is None else f" (now {workers})"
        return "data", (
            f"waiting for data {wait_share:.0%} of the time: use more --workers{now}, or smaller images "
            "(`ov2 shards resize`); `ov2 bench data` shows which part is slow"
        )
    if mfu is not None and mfu < LOW_MFU and memory < LOW_MEMORY:
        return "batch", (
            f"the GPU reaches an MFU of {mfu:.0%} with {memory:.0%} of its memory used: a larger --batch-size and "
            "--torchcompile would use it better"
        )
    return None


class BottleneckWatch:
    """Warns of each bottleneck of a stage once, judged over JUDGED_S of steps.

    The first window is ignored, because workers start and blocks compile in it.
    """

    def __init__(self, workers: int | None) -> None:
        self._workers = workers
        self._warm = False
        self._warned: set[str] = set()
        self._windows: list[tuple[float, Mapping[str, float]]] = []

    def note(self, rates: Mapping[str, float], seconds: float, memory: float) -> str | None:
        """Add a window's rates; the warning to log, or None."""
        if not self._warm:
            self._warm = True
            return None
        self._windows.append((seconds, rates))
        total = sum(seconds for seconds, _ in self._windows)
        if total < JUDGED_S:
            return None
        wait, mfu = (
            sum(seconds * rates.get(name, 0.0) for seconds, rates in self._windows) / total
            for name in ("data_wait_share", "mfu")
        )
        self._windows.clear()
        found = bottleneck(wait, mfu if "mfu" in rates else None, memory, self._workers)
        if found is None or found[0] in self._warned:
            return None
        self._warned.add(found[0])
        return found[1]

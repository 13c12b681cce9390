"""How well a run uses its devices, and what slows it down.

MFU (model FLOPs utilization, PaLM, arXiv 2204.02311, appendix B): the FLOPs of the model's forward and backward pass
over what the devices could have computed in the same time at their dense matrix rate.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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


class Window:
    """Sums over the steps since the last `take`. Tensors are read, and so waited for, in `take` only."""

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
        """Time until the GPU had finished the steps that were added."""
        self._step_s += seconds

    @property
    def seconds(self) -> float:
        return max(self._step_s, 1e-9)

    def take(self, meter: Meter | None = None) -> dict[str, float]:
        """images_per_second, data_wait_share (0 to 1), tokens_per_second (real caption tokens, if they are counted)
        and, with a meter, mfu (0 to 1); the next window begins."""
        seconds = self.seconds
        out = {"images_per_second": self._images / seconds, "data_wait_share": self._wait_s / seconds}
        tokens = sum(float(count) for count in self._tokens) if self._tokens else None
        if tokens is not None:
            out["tokens_per_second"] = tokens / seconds
        if meter is not None:
            out["mfu"] = meter.mfu(self._images, tokens, seconds)
        self._clear()
        return out


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of GPU memory: `peak` is the most that was used so far. `total` is 0 on a CPU."""

    peak: float = 0.0
    total: float = 0.0


def device_memory(device_type: str) -> DeviceMemory:
    if device_type != "cuda":
        return DeviceMemory()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return DeviceMemory(float(torch.cuda.max_memory_allocated()), float(total))


def peak_memory_mb(device_type: str) -> float:
    """MiB: the most that torch has held on the GPU, or on a CPU this process's largest resident set."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def bottleneck(
    wait_share: float, mfu: float | None, memory: DeviceMemory, workers: int | None
) -> tuple[str, str] | None:
    """(cause, one line that says what to do), or None if nothing stands out."""
    if wait_share > WAIT_SHARE:
        now = "" if workers is None else f" (now {workers})"
        return "data", (
            f"waiting for data {wait_share:.0%} of the time: use more --workers{now}, or smaller images "
            "(`ov2 shards resize`); `ov2 bench data` shows which part is slow"
        )
    used = memory.peak / memory.total if memory.total else 1.0
    if mfu is not None and mfu < LOW_MFU and used < LOW_MEMORY:
        return "batch", (
            f"the GPU reaches an MFU of {mfu:.0%} with {used:.0%} of its memory used: a larger --batch-size and "
            "--torchcompile would use it better"
        )
    return None


@dataclass
class BottleneckWatch:
    """Warns of each bottleneck once a stage, judged over JUDGED_S of steps.

    The first window after `begin` is ignored, because workers start and blocks compile in it.
    """

    workers: int | None = None
    _warm: bool = False
    _warned: set[str] = field(default_factory=set)
    _seconds: float = 0.0
    _sums: dict[str, float] = field(default_factory=dict)

    def begin(self, workers: int | None) -> None:
        self.workers, self._warm, self._seconds = workers, False, 0.0
        self._warned, self._sums = set(), {}

    def note(self, speed: Mapping[str, float], seconds: float, memory: DeviceMemory) -> str | None:
        """Add a window's `data_wait_share` and `mfu` (if measured); the warning to log, or None."""
        if not self._warm:
            self._warm = True
            return None
        for name in ("data_wait_share", "mfu"):
            if name in speed:
                self._sums[name] = self._sums.get(name, 0.0) + seconds * speed[name]
        self._seconds += seconds
        if self._seconds < JUDGED_S:
            return None
        mean = {name: value / self._seconds for name, value in self._sums.items()}
        self._seconds, self._sums = 0.0, {}
        found = bottleneck(mean["data_wait_share"], mean.get("mfu"), memory, self.workers)
        if found is None or found[0] in self._warned:
            return None
        self._warned.add(found[0])
        return found[1]

"""How well a run uses its devices, and what slows it down.

MFU (model FLOPs utilization, PaLM, arXiv 2204.02311, appendix B): the FLOPs of the model's forward and backward pass
over what the devices could have computed in the same time at their dense matrix rate.
"""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
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
    (None: the model's whole context). `peak_flops`: FLOP/s of all devices of the run together."""

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
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return PeakMemory(peak / 2**20, peak / total)
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
    """Warns of each bottleneck of a stage once, judged over JUDGED_S of steps, but not over the first window, in which
    workers start and blocks compile."""

    def __init__(self, workers: int | None) -> None:
        self._workers, self._warm = workers, False
        self._warned: set[str] = set()
        self._seconds = self._waited = self._worked = 0.0

    def note(self, rates: Mapping[str, float], seconds: float, memory: float) -> str | None:
        """Add a window's rates; the warning to log, or None."""
        if not self._warm:
            self._warm = True
            return None
        self._seconds += seconds
        self._waited += seconds * rates["data_wait_share"]
        self._worked += seconds * rates.get("mfu", 0.0)
        if self._seconds < JUDGED_S:
            return None
        mfu = self._worked / self._seconds if "mfu" in rates else None
        found = bottleneck(self._waited / self._seconds, mfu, memory, self._workers)
        self._seconds = self._waited = self._worked = 0.0
        if found is None or found[0] in self._warned:
            return None
        self._warned.add(found[0])
        return found[1]


# (device name, TFLOP/s in bf16 and fp16, TFLOP/s in fp32 with TF32, which OpenCLIP's `main` enables), dense, from the
# vendors' data sheets (figures "with sparsity" halved). The first name that the device's own name contains counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 1100.0),
    ("GH200", 989.0, 494.0),
    ("H200", 989.0, 494.0),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.0),
    ("H100", 989.0, 494.0),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 62.5),
    ("RTX 4090", 165.0, 82.6),
    ("RTX 3090", 71.0, 35.6),
)
HALF = {"amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16"}
CPU_SIZE, GPU_SIZE = 1024, 8192  # rows of the square matrices: large enough for the full rate
MEASURE_S = 0.3


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device; `source` is "data sheet" or "measured"."""

    flops: float
    source: str


def peak_of(device: torch.device, precision: str) -> Peak:
    """From the data sheet if the device is known, else measured (in less than a second)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return data_sheet(name, precision) or measured_peak(device, precision)


def data_sheet(device_name: str, precision: str) -> Peak | None:
    words = device_name.replace("-", " ").split()
    for name, half, full in PEAKS:
        if all(word in words for word in name.split()):
            return Peak(1e12 * (half if precision in HALF else full), "data sheet")
    return None


@functools.cache
def measured_peak(device: torch.device, precision: str) -> Peak:
    """The best rate of a large square matrix product in the dtype of `precision`."""
    half = torch.float16 if precision in ("amp", "fp16", "pure_fp16") else torch.bfloat16
    on_gpu = device.type == "cuda"
    size, calls = (GPU_SIZE, 10) if on_gpu else (CPU_SIZE, 1)
    own = torch.Generator(device).manual_seed(0)  # leave the global generator as it is: a resumed run depends on it
    a = torch.randn(size, size, device=device, dtype=half if precision in HALF else torch.float32, generator=own)
    best, begin = math.inf, time.perf_counter()
    while time.perf_counter() - begin < MEASURE_S or best == math.inf:
        start = time.perf_counter()
        for _ in range(calls):
            a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return Peak(2.0 * size**3 / best, "measured")

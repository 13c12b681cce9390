"""The dense matrix rate of a device in FLOP/s, which MFU is relative to."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch

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
    known = data_sheet(name, precision)
    return known or measured_peak(device, precision)


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

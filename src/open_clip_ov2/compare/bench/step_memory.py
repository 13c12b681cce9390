"""Peak memory of one step, by the allocator's own count. Bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fixed_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients of the trained ones, and what the optimizer keeps after its first step."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    return tensor_bytes([*model.parameters(), *model.buffers(), *trained, *state])


def step_bytes(step: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """The peak during `step` above weights, gradients and optimizer state.

    `step` must have run before, so that the optimizer has its state. Gradients are gone when the step begins, as
    `zero_grad` leaves them, and what they take when it has ended is taken off.
    """
    optimizer.zero_grad(set_to_none=True)
    above = _cuda_peak(step, device) if device.type == "cuda" else _cpu_peak(step)
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return max(0, above - tensor_bytes(p.grad for p in trained if p.grad is not None))


def _cuda_peak(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(step: Callable[[], None]) -> int:
    """From torch's profiler, whose trace lists each allocation and release; buffers inside oneDNN are not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak

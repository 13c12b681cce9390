"""Peak memory of a step. Oracle: a step whose tensors are counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from open_clip_ov2.compare.bench.step_memory import fixed_bytes, step_bytes

MB = 1 << 20


def test_the_peak_by_hand() -> None:
    """Two tensors of 8 MB at once, then one of 4 MB; gradients of 1 MB do not count, weights neither."""
    weights = nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(weights.parameters(), foreach=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        first = torch.zeros(8 * MB, dtype=torch.uint8)
        second = torch.ones(8 * MB, dtype=torch.uint8)
        del first, second
        third = torch.zeros(4 * MB, dtype=torch.uint8)
        weights.weight.grad = torch.ones(512, 512)
        del third

    step()
    optimizer.step()
    peak = step_bytes(step, optimizer, torch.device("cpu"))
    assert abs(peak - (16 - 1) * MB) < 0.01 * MB
    # Weights, gradients and two moments of 1 MB each.
    assert abs(fixed_bytes(weights, optimizer) - 4 * MB) < 0.01 * MB

"""Activation checkpointing by selection. Oracle: the same block without it; bytes that autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from open_clip_ov2.core.compute import within_budget


def kept_and_gradients(block: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    size = sum(size for place, size in kept.items() if place not in own)
    return size, list(torch.autograd.grad(out.square().sum(), list(block.parameters())))


def test_less_is_kept_and_gradients_stay() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.LayerNorm(32))
    x, found = torch.randn(64, 32), {}
    for budget in (1.0, 0.0):
        torch.compiler.reset()
        found[budget] = kept_and_gradients(torch.compile(block, backend=within_budget(budget)), x)
    _, plain = kept_and_gradients(block, x)
    assert found[0.0][0] < 0.5 * found[1.0][0]
    for _, gradients in found.values():
        for one, other in zip(gradients, plain, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [-0.1, 1.1, float("nan")])
def test_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        within_budget(budget)

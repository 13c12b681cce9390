"""Muon on a CPU. Oracle: momentum and Newton-Schulz written out, a matrix at a time."""

from __future__ import annotations

import pytest
import timm.optim
import timm.optim.muon
import torch
from torch import Tensor, nn

from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.run import optimizers

QUINTIC = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
           (2.8366, -3.0525, 1.2012))  # fmt: skip  # https://leloykun.github.io/ponder/muon-opt-coeffs


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    x = matrix.to(dtype) / matrix.to(dtype).norm()
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


@pytest.mark.parametrize("units", [False, True])
def test_muon_on_a_cpu_computes_in_what_the_cpu_multiplies(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps in float32, or in bfloat16 on a CPU that has units for it; timm's function comes back."""
    monkeypatch.setattr(optimizers, "cpu_multiplies_bfloat16", lambda: units)
    torch.manual_seed(0)
    model, before = nn.Linear(48, 24, bias=False), timm.optim.muon.zeropower_via_newtonschulz
    create = optimizers.timm_optimizer(timm.optim.create_optimizer_v2, lambda: optimizers.Grouping(model))
    optimizer = create(model, "muon", lr=0.1, weight_decay=0.0, momentum=0.95)
    momentum = torch.zeros(24, 48)
    for _ in range(3):
        start, gradient = model.weight.detach().clone(), torch.randn(24, 48)
        model.weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        moved = (start - model.weight.detach()) / (0.1 * 0.2 * 48**0.5)  # arXiv 2502.16982, section 2.2
        exact = orthogonalized(momentum, torch.float32)
        if units:
            assert 1e-3 < (moved - exact).abs().max() < 0.1
        else:
            torch.testing.assert_close(moved, exact, rtol=1e-4, atol=1e-4)
        assert timm.optim.muon.zeropower_via_newtonschulz is before


def test_a_step_that_fails_leaves_nothing_rebound_after_the_next() -> None:
    """Oracle: the object that timm has before."""
    before = timm.optim.muon.zeropower_via_newtonschulz
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    patches.while_stepping(optimizer, optimizers.NEWTON_SCHULZ, lambda original: lambda *_: original)

    def fails() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    optimizer.step()
    assert timm.optim.muon.zeropower_via_newtonschulz is before

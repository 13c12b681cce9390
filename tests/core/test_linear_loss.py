"""Cross entropy without logits. Oracle: torch's cross entropy over all of them, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from open_clip_ov2.core import CaptionLoss, linear_loss
from open_clip_ov2.core.linear_loss import linear_cross_entropy

OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.2, 1e-2)]


def inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, z_loss: float) -> list[Tensor]:
    """nll, objective, and the gradients of the objective, float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    nll = F.cross_entropy(logits, labels, reduction="sum")
    objective = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    objective = objective + z_loss * logits.logsumexp(dim=1).square().sum()
    return [nll.detach(), objective.detach(), *torch.autograd.grad(objective, [hidden, weight])]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
def test_float32_is_the_plain_loss_to_1e_6(smoothing: float, z_loss: float) -> None:
    hidden, weight, labels = inputs(rows=2 * linear_loss.CPU_ROWS + 3, width=16, vocabulary=301)
    nll, objective = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, z_loss=z_loss)
    found = [nll, objective, *torch.autograd.grad(objective, [hidden, weight])]
    for value, expected in zip(found, plain(hidden, weight, labels, smoothing, z_loss), strict=True):
        assert relative(value.detach(), expected) < 1e-6


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
def test_bfloat16_autocast_is_as_near_as_torchs_own(smoothing: float, z_loss: float) -> None:
    """Oracle: the error of torch's cross entropy of bfloat16 logits under the same autocast, against float64."""
    hidden, weight, labels = inputs(rows=400, width=64, vocabulary=500)
    expected = plain(hidden, weight, labels, smoothing, z_loss)
    with torch.autocast("cpu", torch.bfloat16):
        _, objective = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, z_loss=z_loss)
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        torchs = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        torchs = torchs + z_loss * logits.float().logsumexp(dim=1).square().sum()
    found = [objective, *torch.autograd.grad(objective, [hidden, weight])]
    own = [torchs, *torch.autograd.grad(torchs, [hidden, weight])]
    for value, other, exact in zip(found, own, expected[1:], strict=True):
        assert relative(value.detach(), exact) <= 1.1 * relative(other.detach(), exact) + 1e-6
    assert [found[1].dtype, found[2].dtype] == [torch.float32, torch.float32]


@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
def test_compiled_it_is_the_same(smoothing: float, z_loss: float) -> None:
    """Both whole chunks and the last, of another length."""
    hidden, weight, labels = inputs(rows=linear_loss.CPU_ROWS + 5, width=8, vocabulary=53)
    loss = CaptionLoss(label_smoothing=smoothing, z_loss=z_loss)
    loss.compile_softmax(backend="aot_eager")
    head = torch.nn.Linear(8, 53, bias=False)
    head.weight = torch.nn.Parameter(weight.detach())
    sums = loss.from_hidden(hidden, head, labels)
    found = [sums.nll, sums.objective, *torch.autograd.grad(sums.objective, [hidden, head.weight])]
    for value, expected in zip(found, plain(hidden, weight, labels, smoothing, z_loss), strict=True):
        assert relative(value.detach(), expected) < 1e-6


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 40), chunk=st.integers(1, 45), option=st.sampled_from(OPTIONS))
def test_chunks_do_not_matter(rows: int, chunk: int, option: tuple[float, float]) -> None:
    hidden, weight, labels = inputs(rows, width=8, vocabulary=19)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "CPU_ROWS", chunk)
        nll, objective = linear_cross_entropy(hidden, weight, labels, label_smoothing=option[0], z_loss=option[1])
    found = [nll, objective, *torch.autograd.grad(objective, [hidden, weight])]
    for value, expected in zip(found, plain(hidden, weight, labels, *option), strict=True):
        torch.testing.assert_close(value.detach().double(), expected, atol=1e-4, rtol=1e-5)


def test_a_certain_label_and_a_hopeless_one() -> None:
    """Oracle: float64. Logits far apart: neither infinities nor zeros where the true value is neither."""
    hidden = torch.tensor([[200.0], [200.0]], requires_grad=True)
    weight = torch.tensor([[0.5], [-0.5]], requires_grad=True)
    labels = torch.tensor([0, 1])
    nll, objective = linear_cross_entropy(hidden, weight, labels)
    assert nll.item() == pytest.approx(200.0)
    (gradient,) = torch.autograd.grad(objective, hidden)
    torch.testing.assert_close(gradient.double(), plain(hidden, weight, labels, 0.0, 0.0)[2])


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, weight, labels = inputs(rows=5, width=4, vocabulary=7)
    frozen = weight.detach()
    nll, objective = linear_cross_entropy(hidden, frozen, labels)
    assert not nll.requires_grad
    objective.backward()
    assert hidden.grad is not None
    assert frozen.grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels)[0], nll)

"""The guard against non-finite steps. Oracle: the same optimizer with and without the bad step."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from open_clip_ov2.errors import RunFailed
from open_clip_ov2.openclip.run.baselines import stock_epoch
from open_clip_ov2.train.guard import StepGuard, StockGuard, gradient_norm, not_finite, step_unless


def optimizer_of(fused: bool) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.arange(1.0, 5.0))
    return weight, torch.optim.AdamW([weight], lr=0.1, fused=fused)


def take(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    weight.grad = torch.full_like(weight, gradient)
    step_unless(optimizer, None, ~torch.isfinite(gradient_norm([weight])))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_leaves_weights_and_moments_bit_for_bit(fused: bool, bad: float) -> None:
    weight, optimizer = optimizer_of(fused)
    other, plain = optimizer_of(fused)
    for gradient in (1.0, bad, -2.0, bad, bad, 0.5):
        take(weight, optimizer, gradient)
    for gradient in (1.0, -2.0, 0.5):
        other.grad = torch.full_like(other, gradient)
        plain.step()
    assert torch.equal(weight, other)
    ours, theirs = optimizer.state[weight], plain.state[other]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not hasattr(optimizer, "found_inf")


def test_a_step_that_is_not_ours_is_guarded_by_a_hook() -> None:
    weight, optimizer = optimizer_of(False)
    other, plain = optimizer_of(False)
    guard = StockGuard(optimizer)
    for gradient in (1.0, float("nan"), -2.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        assert bool(guard.bad) == (gradient != gradient)
    for gradient in (1.0, -2.0):
        other.grad = torch.full_like(other, gradient)
        plain.step()
    assert torch.equal(weight, other)
    guard.close()
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert weight.isnan().all()


def test_many_in_a_row_end_the_run_and_single_ones_do_not(caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: counted by hand; the verdict on a step is read at the next."""
    guard = StepGuard(limit=3, last_good=lambda: "checkpoints/stage_1.pt")
    yes, no = torch.tensor(True), torch.tensor(False)
    with caplog.at_level(logging.WARNING):
        for step, bad in enumerate((yes, yes, no, yes, yes)):
            guard.note(bad, [f"key{step}-{row}" for row in range(10)], step)
        guard.check()
    assert (len(caplog.records), guard.in_a_row) == (4, 2)
    assert "key0-0, key0-1" in caplog.text
    assert "key0-7 and 2 more" in caplog.text
    assert "key2" not in caplog.text
    guard.note(yes, ["last"], 9)
    with pytest.raises(RunFailed, match=r"3 steps in a row .* last good checkpoint: checkpoints/stage_1\.pt"):
        guard.check()


@pytest.mark.parametrize(
    ("loss", "scale", "bad"), [(1.0, 2.0**16, False), (float("nan"), 2.0**16, True), (1.0, 1.0, True)]
)
def test_an_overflow_of_fp16_is_the_scalers_own(loss: float, scale: float, bad: bool) -> None:
    """Oracle: GradScaler itself leaves the step out and halves its scale; at 1 there is nothing left to halve."""
    weight, optimizer = optimizer_of(fused=False)
    before = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(weight.sum() * 0).backward()
    weight.grad = torch.full_like(weight, float("inf"))
    scaler.unscale_(optimizer)
    assert bool(not_finite(torch.tensor([loss]), gradient_norm([weight]), scaler)) is bad
    step_unless(optimizer, scaler, torch.tensor(bad))
    assert torch.equal(weight, before)
    assert scaler.get_scale() == scale / 2


@pytest.mark.parametrize(("scale", "bad"), [(2.0**16, False), (1.0, True)])
def test_a_step_that_a_scaler_leaves_out_of_its_own_accord(scale: float, bad: bool) -> None:
    """The hook is not called then. Oracle: the rule of `not_finite`; and a good step after it is good."""
    weight, optimizer = optimizer_of(fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    guard = StockGuard(optimizer)
    for gradient, expected in ((float("nan"), bad), (1.0, False)):
        guard.expect(scaler)
        scaler.scale(weight.sum() * 0).backward()
        weight.grad = torch.full_like(weight, gradient)
        scaler.step(optimizer)
        scaler.update()
        assert bool(guard.bad) is expected
        optimizer.zero_grad()
    assert optimizer.state[weight]["step"] == 1


def test_openclips_epoch_reports_what_a_scaler_leaves_out() -> None:
    """Oracle: the gradients. OpenCLIP's own loop takes fp16 on a GPU alone; the one here steps as it does."""
    weight, optimizer = optimizer_of(fused=False)
    scaler, gradients, reports = torch.amp.GradScaler("cpu", init_scale=1.0), iter((1.0, float("nan"), 1.0)), []

    def stock(model: Any, data: Any, loss: Any, epoch: int, optimizer: Any, scaler: Any, *_: Any, **__: Any) -> None:
        for _batch in data["train"].dataloader:
            optimizer.zero_grad()
            scaler.scale(weight.sum() * 0).backward()
            weight.grad = torch.full_like(weight, next(gradients))
            scaler.step(optimizer)
            scaler.update()

    class Loader(list[Any]):
        num_batches, num_samples = 3, 3

    batch = SimpleNamespace(images_BCHW=weight, texts_BL=weight, keys=["a"], skipped={})
    loss = SimpleNamespace(report=dict)
    stock_epoch(
        stock, torch.nn.Linear(1, 1), Loader([batch] * 3), loss, 0, optimizer, scaler, None, None,
        SimpleNamespace(accum_freq=1), after_step=reports.append,
    )  # fmt: skip
    assert [bool(report.bad) for report in reports] == [False, True, False]

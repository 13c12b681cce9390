"""The optimizer step. Oracle: core/reference.py over the whole batch, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import EOS, model_of, part, settings, whole_batch, write_gradients, write_windows
from reference_loss import gradients_of_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training import finish, start_ranks

from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.train.step import optimizer_step, windows


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of twice the caption loss, and the caption loss. Every token is kept, in any order."""
    batch = whole_batch()
    every_token = torch.arange(16).expand(len(batch.keys), -1)
    loss, gradients = gradients_of_reference(model_of(), batch.images_BCHW, batch.texts_BL, every_token)
    return {name: 2.0 * gradient.float() for name, gradient in gradients.items()}, loss.float()


def assert_same(gradients: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():  # 1e-6 of the tensor's largest entry, or absolute where that is below 1
        largest = max(1.0, plain[name].abs().max().item())
        torch.testing.assert_close(gradient, plain[name], atol=1e-6 * largest, rtol=0)


@pytest.mark.parametrize("accum_freq", [1, 2, 4])
def test_accumulation_equals_the_big_batch(plain: tuple[dict[str, Tensor], Tensor], accum_freq: int) -> None:
    model, batch = model_of(), whole_batch()
    size = 8 // accum_freq
    window = [part(batch, start, start + size) for start in range(0, 8, size)]
    forwards: list[int] = []
    model.visual.conv1.register_forward_hook(lambda *_: forwards.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = optimizer_step(model, window, CaptionLoss(), optimizer, None, settings(1, accum_freq))
    assert len(forwards) == accum_freq  # no forward runs twice
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, plain[0])
    torch.testing.assert_close(result.losses(settings(1, accum_freq))["caption_loss"], plain[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("processes", "accum_freq"), [(2, 1), (2, 2)])
def test_two_processes_give_the_gradients_of_one(
    plain: tuple[dict[str, Tensor], Tensor], tmp_path: Path, processes: int, accum_freq: int
) -> None:
    out = tmp_path / "gradients.pt"
    done = finish(start_ranks(write_gradients, (out, accum_freq), processes))
    assert [status for status, _ in done] == [0] * processes, done
    found = torch.load(out, weights_only=True)
    assert_same(found["gradients"], plain[0])
    torch.testing.assert_close(found["losses"]["caption_loss"], plain[1], atol=1e-6, rtol=0)
    total = torch.stack([gradient.norm() for gradient in plain[0].values()]).norm()
    torch.testing.assert_close(found["norm"], total)


def test_two_processes_accumulate_alike_until_there_are_enough_tokens(tmp_path: Path) -> None:
    """Oracle: by hand. Rows have 2, 3, 4, ... 8, 8 targets with the end of text, so batches of both have 5, 9, 13, 16:
    17 tokens are in the first three, and the last step takes what is left."""
    assert [status for status, _ in finish(start_ranks(write_windows, (tmp_path, 17), 2))] == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3 1", "3 1"]


def test_gradients_summed_in_bfloat16(plain: tuple[dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    """Oracle: the plain gradient within bfloat16's rounding of two halves, and every entry a bfloat16 number."""
    out = tmp_path / "gradients.pt"
    assert [status for status, _ in finish(start_ranks(write_gradients, (out, 1, "bf16"), 2))] == [0, 0]
    for name, gradient in torch.load(out, weights_only=True)["gradients"].items():
        assert torch.equal(gradient, gradient.bfloat16().float()), name
        largest = max(1.0, plain[0][name].abs().max().item())
        torch.testing.assert_close(gradient, plain[0][name], atol=largest * 2**-7, rtol=0)


def test_clipping_scales_the_update() -> None:
    """Oracle: SGD with learning rate 1 moves by the clipped gradient, whose norm is the limit."""
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    result = optimizer_step(model, [whole_batch()], CaptionLoss(), optimizer, None, settings(1, 1, clip=0.01))
    moved = torch.stack([(p.detach() - before[name]).norm() for name, p in model.named_parameters()]).norm()
    assert result.grad_norm > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_windows_leave_an_incomplete_one_out_and_targets_are_counted() -> None:
    batch = whole_batch()
    assert [len(window) for window in windows([batch] * 7, 3)] == [3, 3]
    assert settings(1, 1).compute.packed(batch.texts_BL).num_targets == sum(min(row + 1, 7) + 1 for row in range(8))


class Questions(TorchDispatchMode):
    """Notes the operators that would make the host wait for a GPU."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.ASKING:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_a_step_asks_the_device_nothing(accum_freq: int) -> None:
    """Oracle: the operators themselves. Packing captions asks, of ids that are still on the CPU."""
    model, batch, options = model_of(), whole_batch(), settings(1, accum_freq, clip=1.0)
    size = 8 // accum_freq
    window = [part(batch, start, start + size) for start in range(0, 8, size)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    with Questions() as of_ids:
        for one in window:
            options.compute.packed(one.texts_BL)
    with Questions() as of_step:
        optimizer_step(model, window, CaptionLoss(label_smoothing=0.1, z_loss=1e-4), optimizer, None, options)
    assert of_step.asked == of_ids.asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts host synchronisations, which a GPU alone has")
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_step_never_waits_for_the_gpu(precision: str) -> None:
    """Oracle: CUDA's own debug mode, which raises where the host waits."""
    model = model_of().cuda()
    on_gpu = Compute(torch.device("cuda"), precision, 1, EOS)
    options = replace(settings(1, 1, clip=1.0), compute=on_gpu)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = whole_batch()
    batch = batch._replace(images_BCHW=batch.images_BCHW.pin_memory(), texts_BL=batch.texts_BL.pin_memory())
    optimizer_step(model, [batch], CaptionLoss(), optimizer, None, options)  # allocates, and makes optimizer state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer_step(model, [batch], CaptionLoss(), optimizer, None, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_target_tokens_are_counted_by_one_group_in_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the calls of torch.distributed.new_group; groups stay until the run ends."""
    made: list[Any] = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: made.append(options))
    options = replace(settings(2, 1), tokens_per_step=20)
    for _ in range(2):
        assert len(list(options.windows([whole_batch()]))) == 1
    assert made == [{"backend": "gloo"}]

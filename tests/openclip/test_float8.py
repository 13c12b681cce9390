"""Matrix products in float8. Oracle: the rounding and the three products of a layer, written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import model_of
from torch import Tensor
from training import NANO, data_flags, results

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.run.finetune import use_float8
from open_clip_ov2.training import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> tuple[CaptionModel, CaptionModel]:
    """A model, and its copy in float8."""
    pytest.importorskip("torchao")
    plain = model_of()
    rounded = copy.deepcopy(plain)
    use_float8(rounded, "emulated", CPU)
    return plain, rounded


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To float8, with the scale that brings the largest entry to the type's largest."""
    scale = (torch.finfo(dtype).max / x.abs().amax().double()).float()
    return (x * scale).to(dtype).float() / scale


@pytest.mark.parametrize("name", ["attn.projects_by", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"])
def test_each_matrix_of_a_block(models: tuple[CaptionModel, CaptionModel], name: str) -> None:
    block = models[1].visual.transformer.resblocks[1]
    owner, _, last = name.partition(".")
    layer: Any = getattr(getattr(block, owner), last)  # projects_by is no submodule
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, layer.in_features, generator=generator, requires_grad=True)
    gradient = torch.randn(24, layer.out_features, generator=generator)
    out = layer(x)
    found = (out, *torch.autograd.grad(out, (x, layer.weight), gradient))
    x8, w8 = (rounded_to(value.detach(), torch.float8_e4m3fn) for value in (x, layer.weight))
    g8 = rounded_to(gradient, torch.float8_e5m2)
    for one, other in zip(found, (x8 @ w8.T + layer.bias, g8 @ w8, g8.T @ x8), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_weights_stay_plain_and_attention_uses_them(models: tuple[CaptionModel, CaptionModel]) -> None:
    plain, rounded = models
    assert list(plain.state_dict()) == list(rounded.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in rounded.named_parameters()]
    block = rounded.visual.transformer.resblocks[0]
    assert block.attn.projects_by.weight is block.attn.in_proj_weight
    x = torch.randn(2, 5, 16)
    assert not torch.equal(block(x), plain.visual.transformer.resblocks[0](x))


def test_a_gpu_is_needed_unless_it_is_emulated() -> None:
    with pytest.raises(UserError, match="emulated"):
        use_float8(model_of(), "on", CPU)


def test_a_run_in_float8_is_near_the_run_in_bfloat16(
    squares: Path, models: tuple[CaptionModel, CaptionModel], tmp_path: Path
) -> None:
    """Oracle: the same run without; the two agree to what float8 rounds, and their checkpoints have the same names."""
    losses, names = [], []
    for name, flags in (("bf16", []), ("fp8", ["--fp8", "emulated"])):
        common = [*NANO, *data_flags(squares, 16), "--precision", "amp_bf16", "--sample-captions", "0"]
        train([*common, "--logs", str(tmp_path), "--name", name, *flags])
        losses.append(results(tmp_path / name, "val")[-1]["caption_loss"])
        names.append(list(torch.load(tmp_path / name / "checkpoints" / "stage_1.pt", weights_only=True)["state_dict"]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert names[0] == names[1]

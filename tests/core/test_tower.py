"""Faster parts of OpenCLIP's encoder. Oracle: torch's own modules over the same parameters, in float64."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from open_clip_ov2.core import class_token
from open_clip_ov2.core.class_token import class_token_attention
from open_clip_ov2.core.tower import LinearPatches, SelfAttention, use_fast_parts


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(module: nn.Module, out: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out, parameters, random(*out.shape, seed=1).to(out))]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 30), st.booleans())
def test_patches_are_the_convolutions(patch: int, height: int, width: int, bias: bool) -> None:
    if min(height, width) < patch:
        return
    plain = nn.Conv2d(3, 6, patch, stride=patch, bias=bias).double()
    fast = copy.deepcopy(plain)
    fast.__class__ = LinearPatches
    images = random(2, 3, height, width)
    for found, expected in zip(with_gradients(fast, fast(images)), with_gradients(plain, plain(images)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}])
def test_other_convolutions_stay_convolutions(options: dict[str, int]) -> None:
    plain = nn.Conv2d(3, 6, 4, **options)
    fast = copy.deepcopy(plain)
    fast.__class__ = LinearPatches
    images = random(2, 3, 12, 12, dtype=torch.float32)
    assert torch.equal(fast(images), plain(images))


@pytest.mark.parametrize("same", [True, False])
def test_attention_is_multihead_attention(same: bool) -> None:
    plain = nn.MultiheadAttention(24, 4, batch_first=True).double()
    fast = copy.deepcopy(plain)
    fast.__class__ = SelfAttention
    x = random(2, 7, 24)
    query = x if same else x[:, 2:5].contiguous()
    found, expected = (
        with_gradients(module, module(query, x, x, need_weights=False, attn_mask=None)[0]) for module in (fast, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(fast(query, x, x)[1], plain(query, x, x)[1])  # weights, when they are wanted


def test_all_parts_of_the_tower_are_found_and_its_state_stays() -> None:
    visual = open_clip.create_model("ViT-S-32", load_weights=False).visual
    keys, images = list(visual.state_dict()), random(2, 3, 224, 224, dtype=torch.float32)
    before = visual(images)
    use_fast_parts(visual)
    kinds = {type(module) for module in visual.modules()}
    assert {LinearPatches, SelfAttention} <= kinds
    assert not {nn.Conv2d, nn.MultiheadAttention} & kinds
    assert list(visual.state_dict()) == keys
    torch.testing.assert_close(visual(images), before)


def attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.floats(0.1, 8.0))
def test_a_class_token_apart_is_attention(batch: int, patches: int, heads: int, spread: float) -> None:
    """`spread`: with large scores one token takes all, at times the class token."""
    qkv = (spread * random(batch, 1 + patches, 3 * heads * 8)).requires_grad_()
    out_gradient = random(batch, 1 + patches, heads * 8, seed=1)
    plain, apart = attention(qkv, heads), class_token_attention(qkv, heads)
    pairs = [(apart, plain)]
    (expected,), (found,) = (torch.autograd.grad(out, qkv, out_gradient) for out in (plain, apart))
    pairs.append((found, expected))
    for one, other in pairs:  # the class token's part is computed in float32
        assert (one - other).norm() < 1e-5 * other.norm() + 1e-6


def test_it_is_for_whole_tiles_on_a_gpu() -> None:
    assert not class_token.pays(random(2, 1 + class_token.TILE, 24, dtype=torch.float32).bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's kernel is another")
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_gpus_kernel_takes_a_class_token_apart(tiles: int) -> None:
    """Oracle: float64; the error is no more than 1.5 times that of torch's own attention in bfloat16."""
    qkv = random(4, 1 + class_token.TILE * tiles, 3 * 4 * 64)
    gradient = random(4, 1 + class_token.TILE * tiles, 4 * 64, seed=1)

    def run(function: object, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out = function(x, 4)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, x, gradient.to(x))]

    exact = run(attention, qkv)
    half = qkv.cuda().bfloat16()
    ours, torchs = run(torch.compile(class_token_attention), half), run(attention, half)
    for one, other, expected in zip(ours, torchs, exact, strict=True):
        error, own = ((x.double().cpu() - expected).norm() / expected.norm() for x in (one, other))
        assert error < 1.5 * own + 1e-4, (float(error), float(own))

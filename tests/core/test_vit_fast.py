"""Faster parts of OpenCLIP's encoder. Oracle: torch's own modules over the same parameters, in float64."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from open_clip_ov2.core import CaptionModel, DecoderConfig, KeepRatio, TextConfig, attention
from open_clip_ov2.core.vit_fast import (
    BLOCK,
    TOWER,
    TRANSFORMER,
    LinearPatches,
    SelfAttention,
    check_tower,
    use_fast_parts,
)


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
    assert LinearPatches in kinds
    assert SelfAttention in kinds or not open_clip.__version__.startswith(
        "3.3."
    )  # OpenCLIP 4 has an Attention of its own
    assert not {nn.Conv2d, nn.MultiheadAttention} & kinds
    assert list(visual.state_dict()) == keys
    torch.testing.assert_close(visual(images), before)


def test_which_kernels_there_are_is_asked_once_and_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a question that torch.compile could not trace, in one whole graph."""
    asked = []

    def answer(device: torch.device) -> bool:
        asked.append((device.type, os.getpid()))
        return False

    monkeypatch.setattr(attention, "_has_half_kernels", answer)
    module = nn.MultiheadAttention(32, 2, batch_first=True).bfloat16()
    module.__class__ = SelfAttention
    x = random(2, 7, 32).bfloat16()
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), compiled(x))
    assert {kind for kind, _ in asked} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's kernels are others")
@pytest.mark.parametrize("tokens", [37, 257])
def test_a_gpus_attention(tokens: int) -> None:
    """Oracle: float64; the error is no more than 1.5 times that of MultiheadAttention in bfloat16."""
    exact = nn.MultiheadAttention(128, 2, batch_first=True).double()
    x, errors = random(3, tokens, 128), []
    expected = with_gradients(exact, exact(x, x, x, need_weights=False)[0])
    for kind in (nn.MultiheadAttention, SelfAttention):
        half = copy.deepcopy(exact).to("cuda", torch.bfloat16)
        half.__class__ = kind
        y = x.to("cuda", torch.bfloat16)
        found = with_gradients(half, half(y, y, y, need_weights=False)[0])
        pairs = zip(found, expected, strict=True)
        errors.append([float((one.double().cpu() - other).norm() / other.norm()) for one, other in pairs])
    assert all(ours < 1.5 * torchs + 1e-3 for torchs, ours in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("name", [*TOWER, *(f"transformer.{name}" for name in TRANSFORMER)])
def test_an_encoder_without_a_name_that_is_used_is_one_line(name: str) -> None:
    """Each name renamed in turn, as another version of OpenCLIP may do. Oracle: the name is in the message."""
    with torch.device("meta"):
        visual = open_clip.create_model("ov2-vit-nano-8", device="meta", load_weights=False).visual
    check_tower(visual)
    inner, _, last = name.rpartition(".")
    owner = visual.get_submodule(inner)
    with pytest.raises(ImportError, match=re.escape(name)) as error, without(owner, last):
        check_tower(visual)
    assert "3.3.*" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BLOCK)
def test_blocks_without_a_name_that_is_used_are_one_line(name: str) -> None:
    with torch.device("meta"):
        visual = open_clip.create_model("ov2-vit-nano-8", device="meta", load_weights=False).visual
    with pytest.raises(ImportError, match=rf"resblocks\.0\.{name}"), without(visual.transformer.resblocks[0], name):
        CaptionModel(visual, DecoderConfig(8, 1, 1, 8), TextConfig(8, 9, 1, 2), keep_ratio=KeepRatio.of(1.0))


@contextlib.contextmanager
def without(owner: nn.Module, name: str) -> Iterator[None]:
    """The attribute is gone, be it of the object or of its class."""
    kind = type(owner)

    def lookup(self: nn.Module, asked: str) -> object:
        if asked == name:
            raise AttributeError(asked)
        return kind.__getattribute__(self, asked)

    def fallback(self: nn.Module, asked: str) -> object:
        if asked == name:
            raise AttributeError(asked)
        return kind.__getattr__(self, asked)

    owner.__class__ = type(kind.__name__, (kind,), {"__getattribute__": lookup, "__getattr__": fallback})
    try:
        yield
    finally:
        owner.__class__ = kind


def test_another_flash_attention_is_used_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's own registry, with kernels that are missing and some that are there; and a torch without it."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    registry = pytest.importorskip("torch.nn.attention._registry")
    with pytest.raises(ValueError, match="cannot use FA3 here") as error:
        attention.use_flash_attention("FA3")
    assert "\n" not in str(error.value)
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    removed: list[bool] = []
    handle = type("Handle", (), {"remove": lambda self: removed.append(True)})
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA3", handle)
    try:
        attention.use_flash_attention("FA3")
        assert torch.nn.attention.current_flash_attention_impl() == "FA3"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    assert removed
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="cannot exchange its FlashAttention"):
        attention.use_flash_attention("FA3")

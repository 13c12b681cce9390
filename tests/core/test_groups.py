"""Captions in groups of similar length. Oracle: the same model over the whole padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, CaptionModel, caption_targets
from open_clip_ov2.core.groups import LENGTH_STEP, LengthGroups, length_groups
from open_clip_ov2.seam.factory import build_caption_model

BOS, EOS, CONTEXT = 1, 2, 30


def build(fusion: str) -> CaptionModel:
    torch.manual_seed(0)
    return build_caption_model(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": CONTEXT, "vocab_size": 40, "bos_id": BOS, "eos_id": EOS},
        decoder_cfg={"width": 24, "layers": 2, "heads": 2, "mlp_width": 32, "fusion": fusion},
        keep_ratio=0.35,
    ).train()


def captions(lengths: list[int]) -> Tensor:
    """`(B, CONTEXT)`: [bos] words [eos] and padding; a caption of CONTEXT - 1 words has no end."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[: length + 1] = torch.randint(3, 40, (length + 1,), generator=generator)
        row[0] = BOS
        row[length + 1 : length + 2] = EOS
    return ids


LENGTHS = st.lists(st.integers(0, CONTEXT - 1), min_size=1, max_size=9)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200))
def test_every_target_is_in_one_group(lengths: list[int], min_tokens: int) -> None:
    ids = captions(lengths)
    groups = length_groups(ids, EOS, min_tokens)
    assert sorted(groups.order_B.tolist()) == list(range(len(lengths)))
    found, first = 0, 0
    for rows, length in groups.parts:
        assert length % LENGTH_STEP == 0 or length == CONTEXT
        part = ids[groups.order_B[first : first + rows]]
        assert (caption_targets(part, EOS)[:, length - 1 :] == IGNORE_INDEX).all()
        found += int((caption_targets(part[:, :length], EOS) != IGNORE_INDEX).sum())
        first += rows
    assert first == len(lengths)
    assert found == groups.num_targets == int((caption_targets(ids, EOS) != IGNORE_INDEX).sum())


def gradients(model: CaptionModel, groups: LengthGroups | None, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.randn(len(ids), 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(
        model.text_decoder.lm_head.weight.dtype
    )
    kept = torch.rand(len(ids), 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :5]
    model.zero_grad()
    sums = model(images, ids, kept_idx=kept, caption_loss=CaptionLoss(label_smoothing=0.1, z_loss=1e-3), groups=groups)
    sums.objective.backward()
    return sums.nll.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["prefix", "causal", "cross_attn"])
def model(request: pytest.FixtureRequest) -> CaptionModel:
    return build(request.param).double()


@settings(deadline=None, max_examples=12)
@given(lengths=LENGTHS, min_tokens=st.integers(1, 60))
def test_groups_change_neither_loss_nor_gradient(model: CaptionModel, lengths: list[int], min_tokens: int) -> None:
    ids = captions(lengths)
    nll, plain = gradients(model, None, ids)
    grouped_nll, grouped = gradients(model, length_groups(ids, EOS, min_tokens), ids)
    torch.testing.assert_close(grouped_nll, nll)
    assert grouped.keys() == plain.keys()
    for name, gradient in grouped.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-5)  # sums and head in float32


def test_padding_is_hardly_computed() -> None:
    """Oracle: by hand. One caption of 29 words beside seven of 3: padded, 8 x 30 positions."""
    groups = length_groups(captions([3] * 4 + [29] + [3] * 3), EOS, min_tokens=8)
    assert groups.num_targets == 7 * 4 + 29
    assert groups.parts == ((2, 30), (2, 8), (2, 8), (2, 8))
    assert groups.order_B[0] == 4


def test_lengths_share_their_compiled_graphs() -> None:
    """Oracle: a backend that counts. Every number of rows and length after the first few runs what is there."""
    model = build("prefix")
    torch.compiler.reset()
    counters.clear()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_blocks(backend=counting)
    seen = []
    for lengths in ([5] * 6, [9] * 5 + [29], [3, 20, 12, 7, 1, 1], [16] * 6, [2] * 6):
        gradients(model, length_groups(captions(lengths), EOS, min_tokens=24), captions(lengths))
        seen.append(len(graphs))
    assert 0 < seen[1] == seen[-1]
    assert not counters["graph_break"]

"""Captions without padding. Oracle: core/reference.py over the whole padded batch, in float64."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import gradients_of_reference
from torch import Tensor
from torch._dynamo.utils import counters

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, CaptionModel, caption_targets
from open_clip_ov2.core import rows as core_rows
from open_clip_ov2.core.packing import PackedCaptions, pack_captions
from open_clip_ov2.core.rows import RowAttention, attend, key_value
from open_clip_ov2.openclip.models.factory import build_caption_model

BOS, EOS, CONTEXT = 1, 2, 30


def build(fusion: str) -> CaptionModel:
    torch.manual_seed(0)
    return build_caption_model(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": CONTEXT, "vocab_size": 40, "bos_id": BOS, "eos_id": EOS},
        decoder_cfg={"width": 32, "layers": 2, "heads": 2, "mlp_width": 32, "fusion": fusion},
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
def test_every_target_is_there_once_after_its_own_inputs(lengths: list[int], min_tokens: int) -> None:
    """Oracle: each row taken apart by hand."""
    ids = captions(lengths)
    packed = pack_captions(ids, EOS, min_tokens)
    assert sorted(packed.order_B.tolist()) == list(range(len(lengths)))
    found, rows = [], iter(packed.order_B.tolist())
    start = 0
    for count, positions in packed.parts:
        for _ in range(count):
            row = next(rows)
            assert packed.ids_t[start : start + positions].tolist() == ids[row, :positions].tolist()
            real = int((caption_targets(ids[row : row + 1], EOS) != IGNORE_INDEX).sum())
            found += [(start + place, int(ids[row, place + 1])) for place in range(real)]
            start += positions
    assert start == len(packed.ids_t)
    assert found == list(zip(packed.index_R.tolist(), packed.labels_R.tolist(), strict=True))
    assert packed.num_targets == len(found)


SMOOTHING, Z_LOSS = 0.1, 1e-3


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Images, and five kept tokens of the sixteen of each."""
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images, torch.rand(batch, 16, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :5]


def expected(model: CaptionModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's sum of nll, and gradients of the summed loss."""
    images, kept = inputs(len(ids))
    nll, gradients = gradients_of_reference(model, images, ids, kept, SMOOTHING, Z_LOSS)
    count = int((caption_targets(ids, EOS) != IGNORE_INDEX).sum())
    return nll * count, {name: gradient * count for name, gradient in gradients.items()}


def gradients(model: CaptionModel, packed: PackedCaptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of the model, packed."""
    head = model.text_decoder.lm_head.weight
    images, kept = inputs(len(packed.order_B))
    loss = CaptionLoss(label_smoothing=SMOOTHING, z_loss=Z_LOSS)
    model.zero_grad()
    sums = model(images.to(head), kept_idx=kept.to(head.device), captions=packed, caption_loss=loss)
    sums.objective.backward()
    return sums.nll.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=["prefix", "causal", "cross_attn"])
def model(request: pytest.FixtureRequest) -> CaptionModel:
    return build(request.param).double()


@settings(deadline=None, max_examples=12)
@given(lengths=LENGTHS, min_tokens=st.integers(1, 60))
def test_packing_changes_neither_loss_nor_gradient(model: CaptionModel, lengths: list[int], min_tokens: int) -> None:
    ids = captions(lengths)
    nll, plain = expected(model, ids)
    packed_nll, packed = gradients(model, pack_captions(ids, EOS, min_tokens))
    torch.testing.assert_close(packed_nll.float(), nll.float())  # the loss and the head are in float32
    assert packed.keys() == plain.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's kernels take the mask in another form")
@pytest.mark.parametrize("fusion", ["prefix", "causal", "cross_attn"])
def test_a_gpus_kernels_agree(fusion: str) -> None:
    """Oracle: the reference on the CPU in float64; bfloat16 within its rounding."""
    ids = captions([5, 29, 12, 3, 17, 9])
    nll, plain = expected(build(fusion), ids)
    packed = pack_captions(ids, EOS, 24).to(torch.device("cuda"))
    for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):
        model = build(fusion).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found_nll, found = gradients(model, packed)
        torch.testing.assert_close(found_nll.cpu().double(), nll.double(), atol=0, rtol=tolerance)
        for name, gradient in found.items():
            error = (gradient.cpu().double() - plain[name]).norm() / plain[name].norm().clamp(min=1e-6)
            assert error < tolerance, (name, autocast, float(error))


def emulated_flash(self: RowAttention, q_qHd: Tensor, k_kHd: Tensor, v_kHd: Tensor, most_q: int, most_k: int) -> Tensor:
    """The GPU kernel's part row by row, by torch's attention in the dtype at hand."""
    assert self.starts is not None
    out, heads = [], q_qHd.shape[1]
    ends = self.starts[:, 1:]
    for (begin_q, begin_k), (end_q, end_k) in zip(self.starts[:, :-1].T.tolist(), ends.T.tolist(), strict=True):
        q, k, v = (x.flatten(1)[None] for x in (q_qHd[begin_q:end_q], k_kHd[begin_k:end_k], v_kHd[begin_k:end_k]))
        assert q.shape[1] <= most_q
        assert k.shape[1] <= most_k
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        mask = mask.tril(k.shape[1] - q.shape[1]) if self.causal else mask
        out.append(attend(q, key_value(torch.cat([k, v], dim=-1), heads), heads, mask)[0])
    return torch.cat(out).unflatten(-1, (heads, -1))


@settings(deadline=None, max_examples=12)
@given(lengths=LENGTHS, checkpointing=st.booleans())
def test_rows_of_any_length_at_once(model: CaptionModel, lengths: list[int], checkpointing: bool) -> None:
    """Which token stands where, forward and backward; the kernel itself is tested on a GPU."""
    ids = captions(lengths)
    nll, plain = expected(model, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_rows, "takes_half_kernels", lambda *_: True)
        patch.setattr(RowAttention, "_flash", emulated_flash)
        model.set_grad_checkpointing(checkpointing)
        try:
            found_nll, found = gradients(model, pack_captions(ids, EOS, 1))
        finally:
            model.set_grad_checkpointing(False)
    torch.testing.assert_close(found_nll.float(), nll.float())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_compiled_model_has_its_own_weights() -> None:
    """Oracle: the copy with weights of zero, whose logits are zero."""
    model, ids = build("prefix").eval(), captions([3, 5])
    model.compile_blocks(backend="eager")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        images = torch.randn(2, 3, 32, 32)
        assert not copied(images, ids)["logits"].any()
        assert model(images, ids)["logits"].any()


@pytest.mark.parametrize(("given", "message"), [
    ({"caption_loss": CaptionLoss()}, "go together"),
    ({"captions": pack_captions(captions([3, 5]), EOS, 1)}, "go together"),
    ({"captions": pack_captions(captions([3]), EOS, 1), "caption_loss": CaptionLoss()}, "one for each image"),
    ({"text": captions([3, 5]), "captions": pack_captions(captions([3, 5]), EOS, 1), "caption_loss": CaptionLoss()},
     "in place of text"),
])  # fmt: skip
def test_what_does_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("prefix")(torch.randn(2, 3, 32, 32), **given)


def test_padding_is_hardly_computed() -> None:
    """Oracle: by hand. One caption of 29 words beside seven of 3: padded, 8 x 29 positions."""
    packed = pack_captions(captions([3] * 4 + [29] + [3] * 3), EOS, min_tokens=8)
    assert packed.num_targets == 7 * 4 + 29
    assert packed.parts == ((2, 29), (2, 4), (2, 4), (2, 4))
    assert packed.order_B[0] == 4


@pytest.mark.parametrize("fusion", ["prefix", "cross_attn"])
def test_lengths_share_their_compiled_graphs(fusion: str) -> None:
    """Oracle: a backend that counts. Every number of rows and length after the first few runs what is there."""
    model = build(fusion)
    torch.compiler.reset()
    counters.clear()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_blocks(backend=counting)
    seen = []
    for lengths in ([5] * 6, [9] * 5 + [29], [3, 20, 12, 7, 1, 1], [16] * 6, [2] * 6):
        gradients(model, pack_captions(captions(lengths), EOS, min_tokens=24))
        seen.append(len(graphs))
    assert 0 < seen[1] == seen[-1]
    assert not counters["graph_break"]

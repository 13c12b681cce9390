"""core/reference.py and what computes the same faster.

Oracle of the reference: numbers recorded from the authors' JAX release (tests/golden). Oracle of the rest: the
reference in float64.
"""

from __future__ import annotations

import pytest
import torch
from golden_files import CASES, GoldenCase
from reference_loss import gradients_of_reference, heads_of

from open_clip_ov2.core import CaptionLoss, caption_targets, gather_tokens, reference
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.formats import from_flax


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def test_the_reference_is_the_release(case: GoldenCase) -> None:
    """Tokens, logits, loss and every recorded gradient, at the tolerances of the model itself (test_golden.py)."""
    model, ids, kept = case.build(), case["in/labels"].long(), case["kept_idx"].long()
    params, heads = model.state_dict(), heads_of(model)
    tokens = reference.encode(params, case.images, heads[0])
    torch.testing.assert_close(tokens, case["enc/tokens"], atol=1e-5, rtol=0)
    logits = reference.decode(params, gather_tokens(tokens, kept), ids[:, :-1], heads[1], case.fusion)
    torch.testing.assert_close(logits, case["logits"], atol=1e-5, rtol=0)
    assert torch.equal(reference.targets(ids, eos_id=2), caption_targets(ids, eos_id=2))
    loss, gradients = gradients_of_reference(model, case.images, ids, kept)
    torch.testing.assert_close(loss, case["loss"].double(), atol=1e-6, rtol=0)
    for name, expected in from_flax(case.group("grad/")).items():
        torch.testing.assert_close(gradients[name].float(), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["logits", "packed"])
def test_the_model_is_the_reference(case: GoldenCase, way: str, checkpointing: bool) -> None:
    """Loss and every gradient, from logits of the padded batch and packed with the linear loss; the last block of the
    encoder computes the kept tokens alone in both. The loss itself is float32."""
    model, ids, kept = case.build().double().train(), case["in/labels"].long(), case["kept_idx"].long()
    model.set_grad_checkpointing(checkpointing)
    images = case.images.double()
    if way == "packed":
        sums = model(images, kept_idx=kept, captions=pack_captions(ids, 2, min_tokens=8), caption_loss=CaptionLoss())
    else:
        out = model(images, ids, kept_idx=kept)
        sums = CaptionLoss()(out["logits"], out["labels"])
    found = sums.objective / sums.num_targets
    found.backward()
    loss, gradients = gradients_of_reference(model, images, ids, kept)
    torch.testing.assert_close(found.detach().double(), loss, atol=0, rtol=1e-6)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_random_subset_of_each_image() -> None:
    """Oracle: sets; K as the release has it (docs/reference.md)."""
    kept_BK = reference.keep(5, 256, 0.35)
    assert kept_BK.shape == (5, 89)
    assert all(len(set(row)) == 89 and max(row) < 256 for row in kept_BK.tolist())
    assert not torch.equal(kept_BK[0], kept_BK[1])

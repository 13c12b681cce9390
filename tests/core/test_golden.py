"""Oracle: numbers recorded from the authors' JAX release (tests/golden, reference.md "Golden files")."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import CASES, GoldenCase

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, caption_targets, gather_tokens
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.formats import from_flax


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    return GoldenCase(request.param)


def test_tokens_pooled_and_kept_tokens(case: GoldenCase) -> None:
    model = case.build().eval()
    with torch.no_grad():
        pooled_BD, tokens_BND = model.visual(case.images)
    torch.testing.assert_close(tokens_BND, case["enc/tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled_BD, case["enc/pooled"], atol=1e-5, rtol=0)
    kept_BKD = gather_tokens(tokens_BND, case["kept_idx"].long())
    torch.testing.assert_close(kept_BKD, case["enc/kept_tokens"], atol=1e-5, rtol=0)


def test_targets(case: GoldenCase) -> None:
    targets_BL = caption_targets(case["in/labels"].long(), eos_id=2)
    mask_BL = case["in/cap_loss_mask"].bool()
    assert torch.equal(targets_BL != IGNORE_INDEX, mask_BL)
    assert torch.equal(targets_BL[mask_BL], case["in/autoreg_labels"].long()[mask_BL])


def test_logits_and_loss(case: GoldenCase) -> None:
    model = case.build().train()
    out = model(case.images, case["in/labels"].long(), kept_idx=case["kept_idx"].long())
    torch.testing.assert_close(out["logits"], case["logits"], atol=1e-5, rtol=0)
    sums = CaptionLoss()(out["logits"], out["labels"])
    torch.testing.assert_close(sums.nll / sums.num_targets, case["loss"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_norm(case: GoldenCase, checkpointing: bool) -> None:
    model = case.build().train()
    model.set_grad_checkpointing(checkpointing)
    captions = pack_captions(case["in/labels"].long(), 2, min_tokens=8)
    sums = model(case.images, kept_idx=case["kept_idx"].long(), captions=captions, caption_loss=CaptionLoss())
    loss = sums.objective / sums.num_targets
    torch.testing.assert_close(loss, case["loss"], atol=1e-6, rtol=0)
    loss.backward()
    _compare_gradient_norms(model, case)
    for name, expected in from_flax(case.group("grad/")).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=2e-6, rtol=1e-4)


def _compare_gradient_norms(model: torch.nn.Module, case: GoldenCase) -> None:
    """Flax has query, key and value apart, so its norms are compared slice by slice; the key bias is apart:
    its true gradient is zero (softmax does not see a shift of all keys' scores)."""
    flax_values = case.group("params/")
    norms = case.group("gradnorm/")
    for name, expected in norms.items():
        if "encoder_norm" in name:
            assert expected == 0.0
            continue
        if name.endswith("key/bias"):
            continue
        # The same renaming as the parameters': mark the one leaf with ones and see where it lands.
        marked = {key: np.full_like(value, float(key == name)) for key, value in flax_values.items()}
        landed = {key: mark for key, mark in from_flax(marked).items() if mark.any()}
        assert len(landed) == 1
        ((key, mark),) = landed.items()
        norm = (model.get_parameter(key).grad * mark.reshape(model.get_parameter(key).shape)).norm().item()
        assert norm == pytest.approx(float(expected), rel=1e-4), name

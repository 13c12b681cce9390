"""Images, captions and memory of the benchmark. Oracles: counts in the ids themselves; tensors counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from open_clip_ov2.compare.bench.measured_step import (
    Vocabulary,
    caption_lengths,
    fixed_bytes,
    step_bytes,
    synthetic_batch,
)
from open_clip_ov2.compare.bench.settings import CaptionLengths
from open_clip_ov2.core import IGNORE_INDEX, caption_targets
from open_clip_ov2.errors import UserError

MB = 1 << 20
WORDS = Vocabulary(size=200, bos_id=198, eos_id=199, pad_id=0)


def test_lengths_have_the_range_and_the_mean_asked_for() -> None:
    drawn = caption_lengths(20_000, CaptionLengths(12, 128, 64.0), seed=0)
    assert min(drawn) >= 12
    assert max(drawn) <= 128
    assert sum(drawn) / len(drawn) == pytest.approx(64, abs=1)  # standard error 0.18
    assert max(drawn) > 120
    assert min(drawn) < 16
    assert set(caption_lengths(5, CaptionLengths(9, 9, 9.0), seed=0)) == {9}


@pytest.mark.parametrize("context", [32, 20])
def test_ids_are_captions_as_a_tokenizer_makes_them(context: int) -> None:
    lengths = CaptionLengths(4, 32, 16.0)
    images, texts = synthetic_batch(64, 8, context, lengths, WORDS, seed=3)
    assert images.shape == (64, 3, 8, 8)
    assert texts.shape == (64, context)
    assert (texts[:, 0] == WORDS.bos_id).all()
    for row, length in zip(texts, caption_lengths(64, lengths, 3), strict=True):
        end = min(length, context)
        assert row[end - 1] == WORDS.eos_id
        assert (row[end:] == WORDS.pad_id).all()
        assert not set(row[1 : end - 1].tolist()) & {WORDS.bos_id, WORDS.eos_id, WORDS.pad_id}
        assert (caption_targets(row[None], WORDS.eos_id) != IGNORE_INDEX).sum() == end - 1
    assert (texts == WORDS.eos_id).sum() == 64


def test_all_variants_see_the_same() -> None:
    """Whatever their context: a shorter one cuts captions, as a tokenizer does."""
    lengths = CaptionLengths(4, 32, 16.0)
    (images, long), (same, short) = (synthetic_batch(8, 8, context, lengths, WORDS, 5) for context in (32, 20))
    assert torch.equal(images, same)
    assert torch.equal(long[:, :19][short[:, :19] != WORDS.eos_id], short[:, :19][short[:, :19] != WORDS.eos_id])


@pytest.mark.parametrize("text", ["12:128", "a:b:c", "64:32:40", "1:8:4", "12:128:200"])
def test_mistakes(text: str) -> None:
    with pytest.raises(UserError, match="expected"):
        CaptionLengths.parse(text)


def test_the_peak_by_hand() -> None:
    """Two tensors of 8 MB at once, then one of 4 MB; gradients of 1 MB do not count, weights neither."""
    weights = nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(weights.parameters(), foreach=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        first = torch.zeros(8 * MB, dtype=torch.uint8)
        second = torch.ones(8 * MB, dtype=torch.uint8)
        del first, second
        third = torch.zeros(4 * MB, dtype=torch.uint8)
        weights.weight.grad = torch.ones(512, 512)
        del third

    step()
    optimizer.step()
    peak = step_bytes(step, optimizer, torch.device("cpu"))
    assert abs(peak - (16 - 1) * MB) < 0.01 * MB
    # Weights, gradients and two moments of 1 MB each.
    assert abs(fixed_bytes(weights, optimizer) - 4 * MB) < 0.01 * MB

"""Sampling whose noise belongs to a row."""

from __future__ import annotations

import torch
from test_generate import BOS, EOS, tiny

from open_clip_ov2.core.generate import RowSampler, RowSampling


def test_tokens_come_in_proportion_to_the_softmax_over_the_k_likeliest() -> None:
    """Oracle: the definition (Fan et al. 2018), by a chi-squared test at 10^-4 with fixed seeds; greedy is argmax."""
    logits = torch.tensor([2.0, 0.0, 1.5, -1.0, 0.5, 1.0])
    draws, k, temperature = 4000, 4, 0.7
    rows = [RowSampling(k, temperature, seed) for seed in range(draws)]
    chosen = RowSampler(rows)(torch.zeros(draws, 1), logits.expand(draws, -1)).argmax(dim=-1)
    counts = torch.bincount(chosen, minlength=len(logits)).double()
    likeliest = logits.topk(k).indices
    expected = torch.zeros(len(logits)).double()
    expected[likeliest] = (logits[likeliest].double() / temperature).softmax(0) * draws
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum() < 21.1  # 3 degrees of freedom
    greedy = RowSampler([RowSampling(seed=seed) for seed in range(9)])(torch.zeros(9, 1), logits.expand(9, -1))
    assert greedy.argmax(dim=-1).tolist() == [0] * 9


def test_a_caption_does_not_depend_on_its_batch() -> None:
    """Property: together, in another order, and one by one, rows of several samplers get the same tokens; with another
    seed others, which are those of no greedy generation."""
    model, images = tiny(), torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    rows = [RowSampling((1, 3, 8)[row % 3], 2.0, seed=row) for row in range(8)]

    def generated(places: list[int], rows: list[RowSampling]) -> dict[int, list[int]]:
        sampler = RowSampler([rows[place] for place in places])
        ids = model.generate(images[places], logits_processor=sampler, fixed_output_length=True)
        assert (ids[:, 0] == BOS).all()
        return dict(zip(places, ids.tolist(), strict=True))

    together = generated(list(range(8)), rows)
    assert generated([5, 2, 7, 0, 1], rows).items() <= together.items()
    assert {place: ids for one in range(8) for place, ids in generated([one], rows).items()} == together
    greedy = generated(list(range(8)), [RowSampling()] * 8)
    assert [together[place] == greedy[place] for place in (0, 3, 6)] == [True] * 3
    other = generated(list(range(8)), [RowSampling(row.top_k, 2.0, row.seed + 100) for row in rows])
    assert sum(together[place] != other[place] for place in (1, 2, 4, 5, 7)) >= 3
    assert all(EOS in ids or len(ids) == model.context_length for ids in together.values())

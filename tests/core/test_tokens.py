"""Token dropping. Oracles: reference.md's counts, set properties, and torch.gather written as a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_clip_ov2.core import KeepRatio, TokenDrop, gather_tokens, num_kept, sample_kept_indices


@pytest.mark.parametrize(("tokens", "kept"), [(36, 12), (256, 89), (576, 201)])
def test_counts_of_the_reference(tokens: int, kept: int) -> None:
    assert num_kept(tokens, 0.35) == kept


@settings(deadline=None, max_examples=50)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 60), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_sampling_is_without_replacement_and_seedable(batch: int, tokens: int, ratio: float, seed: int) -> None:
    if int(tokens * ratio) < 1:
        with pytest.raises(ValueError, match="keeps none"):
            num_kept(tokens, ratio)
        return
    kept = num_kept(tokens, ratio)
    draws = [sample_kept_indices(batch, tokens, kept, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (batch, kept)
    for row in draws[0].tolist():
        assert len(set(row)) == kept
        assert all(0 <= index < tokens for index in row)


def test_every_token_is_kept_equally_often() -> None:
    """Oracle: each of N tokens is kept with probability K/N; 6 standard deviations of a binomial."""
    draws, tokens, kept = 20_000, 10, 3
    idx = sample_kept_indices(draws, tokens, kept, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(idx.flatten(), minlength=tokens).double()
    expected, deviation = draws * 0.3, (draws * 0.3 * 0.7) ** 0.5
    assert ((counts - expected).abs() < 6 * deviation).all()


def test_gather_takes_the_named_tokens() -> None:
    tokens_BND = torch.randn(3, 7, 5)
    idx_BK = torch.tensor([[6, 0], [1, 2], [3, 3]])
    plain = torch.stack([torch.stack([tokens_BND[b, i] for i in row]) for b, row in enumerate(idx_BK)])
    assert torch.equal(gather_tokens(tokens_BND, idx_BK), plain)


def test_training_and_evaluation_ratios() -> None:
    def kept(drop: TokenDrop) -> int:
        idx_BK = drop(2, 100)
        return 100 if idx_BK is None else idx_BK.shape[1]

    drop = TokenDrop(KeepRatio.of(0.35))
    assert kept(drop.train()) == 35
    assert kept(drop.eval()) == 35  # the training ratio, as the reference
    assert kept(TokenDrop(KeepRatio.of(0.35), eval_keep_ratio=1.0).eval()) == 100
    ranged = TokenDrop(KeepRatio.of("0.25:0.75"))
    assert {kept(ranged.train()) for _ in range(50)} <= set(range(25, 76))
    assert len({kept(ranged.train()) for _ in range(50)}) > 5
    assert kept(ranged.eval()) == 75


@pytest.mark.parametrize("bad", [0, -0.1, 1.5, float("nan"), "half", "0.5:0.2", "0.1:0.2:0.3", "", None])
def test_a_ratio_outside_is_an_error_that_says_so(bad: object) -> None:
    with pytest.raises(ValueError, match="keep_ratio"):
        KeepRatio.of(bad)  # type: ignore[arg-type]


def test_no_tokens_at_all_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="below one patch"):
        num_kept(0, 1.0)

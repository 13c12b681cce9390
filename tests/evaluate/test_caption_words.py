"""Caption words. Oracle: Stanford's PTBTokenizer (CoreNLP 3.4.1) as pycocoevalcap calls it, its output written down."""

from __future__ import annotations

import pytest

from open_clip_ov2.evaluate.text.captioning import caption_words

STANFORD = {
    "A man's dog doesn't (really) run.": "a man 's dog does n't -lrb- really -rrb- run",
    "He said \"hello\" to the cats' owner, didn't he?": "he said hello to the cats owner did n't he",
    "cannot gonna lemme can't won't shouldn't've": "can not gon na lem me ca n't wo n't should n't 've",
    "U.S. Mr. Smith is 3.5 ft. tall at 10:30 a.m.": "u.s. mr. smith is 3.5 ft. tall at 10:30 a.m.",
    "It costs $5.00 or 3, 50% off & more / less * x": "it costs $ 5.00 or 3 50 % off & more / less * x",
    "t-shirt well-known 1/2 of 3,000 -- yes — no – ok ... …": "t-shirt well-known 1/2 of 3,000 yes no ok",
    "'tis 'twas the '90s, not the 1980s or 80's": "'t is 't was the '90s not the 1980s or 80 's",
    "http://example.com a@b.com #tag @user": "http://example.com a@b.com #tag @user",
    "“curly” ‘single’ it’s don’t": "curly single it 's do n't",
    'A bus with "No. 12" on its side': "a bus with no. 12 on its side",
    "AT&T's red-and-white truck in front of St. Paul's.": "at&t 's red-and-white truck in front of st. paul 's",
    "the caramel-colored kitten--asleep; stop.Next one": "the caramel-colored kitten asleep stop.next one",
    "café naïve 中文 word[1] {x}": "café naïve 中文 word -lsb- 1 -rsb- -lcb- x -rcb-",
    "a bar chart with red 3 blue 2 and green 5": "a bar chart with red 3 blue 2 and green 5",
}


@pytest.mark.parametrize("caption", STANFORD)
def test_words_are_stanfords(caption: str) -> None:
    assert " ".join(caption_words(caption)) == STANFORD[caption]


def test_a_caption_of_punctuation_has_no_words() -> None:
    """Property."""
    assert caption_words(" ... ! ") == []

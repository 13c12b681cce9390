"""Reading of rendered pictures. Oracles: cases by hand, and the demo's own pictures, planned by its script."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.reading import COUNT, numbers, rates, read_one, reading_scores, rendered_text
from open_clip_ov2.openclip.models.tokenizer import decode_caption

SCRIPTS = Path(__file__).parents[2] / "scripts"


def one(generated: str, true: str) -> SimpleNamespace:
    """One picture's counts and rates."""
    counts = read_one(generated, true)
    return SimpleNamespace(**counts, rates=lambda: rates(counts))


def test_letters_and_words_by_hand() -> None:
    """Letters without spaces: "thewordcat" to "thewordcut" is one edit of 10; of the 5 words, one."""
    reading = one("the word c u t", "The word  c a t")
    assert (reading.exact, reading.letters, reading.letter_edits) == (0, 10, 1)
    assert (reading.words, reading.word_edits) == (5, 1)
    assert (reading.texts, reading.texts_exact, reading.text_letters, reading.text_edits) == (1, 0, 3, 1)
    assert one("the wordcat", "the word c a t").exact == 1


def test_the_error_of_each_picture_by_hand() -> None:
    """One edit of 10 letters, and a caption with more edits than letters counts as wholly wrong: (0.1 + 1) / 2."""
    rows = [("b", "x", "a cat", "much too long a caption"), ("a", "y", "the word cat", "the word cut")]
    scores = reading_scores(rows)
    assert scores["picture_error"] == pytest.approx(0.55)
    assert {kind: row["picture_error"] for kind, row in scores["by_kind"].items()} == {"x": 1.0, "y": 0.1}
    assert scores["outcomes"]["picture_error"] == {"keys": ["a", "b"], "values": [0.1, 1.0]}


@pytest.mark.parametrize("text", ["a chart with red 13 and blue 2", "a dog, a cat.", "it's a man's hat, 3.5"])
def test_a_tokenizers_spaces_are_no_errors(text: str) -> None:
    """Oracle: OpenCLIP's own tokenizer, there and back."""
    bpe = open_clip.get_tokenizer("ViT-B-32")
    generated = decode_caption(bpe, bpe(text)[0], bpe.sot_token_id, bpe.eot_token_id)
    assert generated != text
    reading = one(generated, text)
    assert (reading.exact, reading.letter_edits, reading.word_edits) == (1, 0, 0)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("the word c a t", "cat"),
        ("The  Word cat", "cat"),
        ("the word", ""),
        ("the words a", "a"),
        ("a red circle", None),
        ("a sign, the word s t o p", "stop"),
    ],
)
def test_rendered_text(caption: str, text: str | None) -> None:
    assert rendered_text(caption) == text


@pytest.mark.parametrize("kind", ["words", "letters", "mixed case", "two words"])
def test_text_that_the_data_script_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the drawn text in lower case."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("rendered_text")
    for seed in range(20):
        planned = script.plan_text(kind, ("apple", "words", "the", "to"), random.Random(seed))
        drawn = "".join(planned.lines).replace(" ", "").lower()
        assert rendered_text(planned.caption) == drawn
        counts = read_one(planned.caption.replace(drawn[-1], "#"), planned.caption)
        assert (counts["texts"], counts["text_letters"]) == (1, len(drawn))


def test_text_that_is_not_told_is_not_read() -> None:
    """By hand: all three letters are missing; more edits than letters are possible."""
    assert one("a red circle", "the word c a t").rates()["text_character_error_rate"] == 1.0
    assert one("the word h o u s e", "the word o x").rates()["text_character_error_rate"] == 2.0
    assert one("the word c a t", "a red circle").rates()["text_exact_match"] is None


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a bar chart with red 3 blue 2 and green 5", {("red", 0): 3, ("blue", 0): 2, ("green", 0): 5}),
        ("three red circles", {(COUNT, 0): 3}),
        ("two cats and ten dogs", {(COUNT, 0): 2, (COUNT, 1): 10}),
        ("red 1 red 2", {("red", 0): 1, ("red", 1): 2}),
        ("sales 3,000 growth 2.5% loss -4", {("sales", 0): 3000, ("growth", 0): 0.025, ("loss", 0): -4}),
        ("mean 1 3 . 5", {("mean", 0): 13.5}),
        ("7 apples", {("", 0): 7}),
        ("a nan, an infinity of inf", {}),
        ("the word t w o", {}),
    ],
)
def test_numbers(caption: str, found: dict[tuple[str, int], float]) -> None:
    assert numbers(caption) == found


def test_numbers_by_hand() -> None:
    """Of four values: one exact, 21 within 5% of 20, 22 not, one missing. One value too many is not all right."""
    true, generated = "a 1 b 20 c 20 d 4", "a 1 b 21 c 22"
    rates = one(generated, true).rates()
    assert (rates["numbers"], rates["number_accuracy"], rates["number_relaxed_accuracy"]) == (4, 0.25, 0.5)
    assert rates["all_numbers_exact"] == 0
    assert one("a 1 b 2", "a 1").rates()["number_accuracy"] == 1
    assert one("a 1 b 2", "a 1").all_numbers_exact == 0
    assert one("three blue squares", "three red circles").all_numbers_exact == 1
    assert one("a 1", "a red circle").rates()["number_accuracy"] is None


def test_rates_are_of_all_pictures_together() -> None:
    """By hand: 1 edit of 2 letters and 0 of 8 is 1/10, not the mean of 1/2 and 0; kinds stand apart."""
    true, generated = {0: "ab", 1: "abcdefgh", 2: "xy", 3: "z"}, {0: "ax", 1: "abcdefgh", 2: "", 3: "z"}
    kinds = {0: "words", 1: "words", 2: "other", 3: ""}
    scores = reading_scores((str(row), kinds[row], true[row], generated[row]) for row in true)
    assert list(scores["by_kind"]) == ["other", "words"]
    words = scores["by_kind"]["words"]
    assert (words["pictures"], words["exact_match"], words["character_error_rate"]) == (2, 0.5, 0.1)
    assert words["word_error_rate"] == 0.5
    assert scores["by_kind"]["other"]["character_error_rate"] == 1
    assert (scores["pictures"], scores["character_error_rate"]) == (4, 3 / 13)


def test_empty_captions_are_reported_and_left_out() -> None:
    """Property: as without them."""
    scores = reading_scores([("k0", "", "a", "a"), ("k1", "", " ", "b")])
    assert scores.items() >= one("a", "a").rates().items()
    assert scores["skipped"] == [{"key": "k1", "cause": "empty caption", "detail": ""}]
    with pytest.raises(UserError, match=r"no image has a caption to be read \(1 empty caption; the first: 0"):
        reading_scores([("0", "", "", "a")])


@pytest.mark.parametrize("kind", ["shapes", "charts"])
def test_the_demos_captions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what the demo planned to draw: the bars in order, the count."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "rendered_shapes", raising=False)
    import rendered_shapes

    for seed in range(40):
        plan = rendered_shapes.plan_picture(kind, False, random.Random(seed))
        combination = plan.combination.split("/")
        found = numbers(plan.caption)
        assert rendered_text(plan.caption) is None
        if kind == "charts":
            *bars, last = (f"{name} {value:g}" for (name, _), value in found.items())
            assert plan.caption == f"a bar chart with {' '.join(bars)} and {last}"
        elif combination[0] == "count":
            assert found == {(COUNT, 0): int(combination[1])}
        else:
            assert found == {}

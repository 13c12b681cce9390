"""CIDEr-D, BLEU-4 and ROUGE-L of generated captions against references.

    CIDEr-D   Vedantam et al. 2015, arXiv 1411.5726, section 7: n = 1..4, sigma = 6. Document frequencies are those of
              the references at hand, so that a value depends on the set, and is 0 for a single picture. Mean over
              pictures, in [0, 10]; papers print 100 times this.
    BLEU-4    Papineni et al. 2002, equation 3, over the corpus, brevity against the closest reference; in [0, 1]
    ROUGE-L   Lin 2004, section 3, beta = 1.2, best precision and best recall over the references; mean over pictures

Scored by pycocoevalcap: COCO's own evaluation code for Python 3, which published numbers were made with; finished
rather than fast-moving. aac-metrics (captions of sounds) tokenizes by Java; nltk and rouge-score lack CIDEr and differ
in beta. Of pycocoevalcap only the scorers are used, which are plain Python; its tokenizer starts Java, so words come
from `ptb.caption_words`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.skipped import Skipped, summary
from open_clip_ov2.evaluate.text.detokenize import detokenized
from open_clip_ov2.evaluate.text.ptb import caption_words

EMPTY_REFERENCES = "no reference with a word"


@dataclass(frozen=True)
class CaptionScores:
    """Over all pictures that have a reference."""

    cider: float
    bleu4: float
    rouge_l: float
    pictures: int
    skipped: tuple[Skipped, ...]


def caption_scores(
    hypotheses: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    keys: Mapping[int, str] | None = None,
    clean: Callable[[str], str] = detokenized,
) -> CaptionScores:
    """Scores of one caption a picture, by the picture's index. An empty caption is one that scores 0.

    `clean` is what is done to the generated captions first; `str` for captions from files, which lost nothing.
    A picture without a reference that has words is skipped under its key (`keys`, else its index).
    Raises UserError if all are, or pycocoevalcap is missing; ValueError if the indices of the two differ.
    """
    if hypotheses.keys() != references.keys():
        raise ValueError(f"captions and references differ in {sorted(hypotheses.keys() ^ references.keys())[:5]}")
    # In the order of the indices: sums of floats are then the same on any number of processes.
    words = {index: _words(references[index]) for index in sorted(references)}
    skipped = tuple(
        Skipped(keys[index] if keys else str(index), EMPTY_REFERENCES) for index, texts in words.items() if not texts
    )
    wanted = {index: texts for index, texts in words.items() if texts}
    if not wanted:
        raise UserError(
            f"no picture has a reference caption ({summary(skipped) or 'no picture at all'}): look at the data"
        )
    given = {index: [" ".join(caption_words(clean(hypotheses[index])))] for index in wanted}
    bleu, cider, rouge = _scorers()
    return CaptionScores(
        cider=float(cider.compute_score(wanted, given)[0]),
        bleu4=float(bleu.compute_score(wanted, given, verbose=0)[0][3]),
        rouge_l=float(rouge.compute_score(wanted, given)[0]),
        pictures=len(wanted),
        skipped=skipped,
    )


def _words(captions: Sequence[str]) -> list[str]:
    """Each caption as words joined by spaces, which is what the scorers split at; those without words left out."""
    return [text for caption in captions if (text := " ".join(caption_words(caption)))]


def _scorers() -> tuple[Any, Any, Any]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise UserError(f"caption scores need {error.name}: pip install 'open_clip_ov2[eval]'") from None
    return Bleu(4), Cider(), Rouge()

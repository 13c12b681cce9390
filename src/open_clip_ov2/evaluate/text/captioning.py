"""CIDEr-D, BLEU-4 and ROUGE-L of generated captions against references, by COCO's own scorers (pycocoevalcap).

Its tokenizer starts Java, and `caption_words` takes its place. The evaluation (Chen et al. 2015, Microsoft COCO
Captions, section 3) lowers the case, splits with Stanford's Penn Treebank tokenizer and drops punctuation; the rules
here are the treebank's (MacIntyre, 1995), as far as captions need them. Compared with Stanford's CoreNLP 3.4.1, 13 of
5,244 names of emoji have other words, those with a typographic apostrophe inside a word (straightened here). Also known
to differ: abbreviations beyond ABBREVIATIONS, emoji (dropped there), fractions such as 9½, a few slang forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from open_clip_ov2.data.skips import Skipped, summary
from open_clip_ov2.errors import UserError, from_extra
from open_clip_ov2.evaluate.text.normalise import detokenized

EMPTY_REFERENCES = "no reference with a word"
# What pycocoevalcap's ptbtokenizer.py drops. It lists brackets as -LRB- and so on, but has lowered the case before,
# so that brackets stay words in every published number; they stay here too.
DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
RENAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
ABBREVIATIONS = (
    "mr mrs ms dr st jr sr prof gen rev hon sgt capt lt col gov sen rep vs etc inc ltd corp co ave blvd rd mt ft "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
# Words that the treebank splits though no apostrophe says so.
MERGED = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "lemme": "lem me"}
MERGED |= {"gimme": "gim me", "'tis": "'t is", "'twas": "'t was"}

_TYPOGRAPHIC = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
_TOKEN = re.compile(
    r"""
      https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+            # addresses
    | -(?:[lr][rsc]b)-                                       # brackets that were renamed before
    | '(?:tis|twas)\b
    | '\d\ds\b                                               # '90s
    | \d{1,2}:\d\d(?!\d)                                     # times
    | \d+/\d+
    | \d+(?:,\d{3})*(?:\.\d+)?(?![\w-])                      # 3,000 and 3.5
    | \.\d+
    | '(?:s|m|d|re|ve|ll)\b                                  # of 80's
    | (?:[^\W\d_]\.)+(?!\w)                                  # u.s., a.m. and initials
    | no\.(?=\s\d)
    | (?:"""
    + "|".join(ABBREVIATIONS.split())
    + r""")\.
    | [#@][^\W\d]\w*
    | \w+(?:(?:[-&/]|\.(?=\w))\w+)*(?:'\w+)*                 # words, with their hyphens and apostrophes
    | \.\.\.+ | -- | '' | ``
    | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))$")


def caption_scores(
    hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]], keys: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Scores of one generated caption a picture, by the picture's index; JSON-ready.

    CIDEr-D: Vedantam et al. 2015, arXiv 1411.5726, section 7; a mean over pictures in [0, 10], with the document
    frequencies of the references at hand. BLEU-4: Papineni et al. 2002, equation 3, over the corpus. ROUGE-L: Lin 2004,
    section 3, beta = 1.2; a mean over pictures. A picture without a reference that has words is skipped under its key
    (`keys`, else its index). Raises UserError if all are, or pycocoevalcap is missing."""
    if hypotheses.keys() != references.keys():
        raise ValueError(f"captions and references differ in {sorted(hypotheses.keys() ^ references.keys())[:5]}")
    # In the order of the indices: sums of floats are then the same on any number of processes.
    words = {index: _words(references[index]) for index in sorted(references)}
    wanted = {index: texts for index, texts in words.items() if texts}
    left_out = [keys[index] if keys else str(index) for index, texts in words.items() if not texts]
    skipped = [Skipped(key, EMPTY_REFERENCES) for key in left_out]
    if not wanted:
        raise UserError(
            f"no picture has a reference caption ({summary(skipped) or 'no picture at all'}): look at the data"
        )
    given = {index: [" ".join(caption_words(detokenized(hypotheses[index])))] for index in wanted}
    with from_extra("eval", "the task caption"):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    return {
        "cider": float(Cider().compute_score(wanted, given)[0]),
        "bleu4": float(Bleu(4).compute_score(wanted, given, verbose=0)[0][3]),
        "rouge_l": float(Rouge().compute_score(wanted, given)[0]),
        "pictures": len(wanted),
        "skipped": [asdict(one) for one in skipped],
    }


def _words(captions: Sequence[str]) -> list[str]:
    """Each caption as words joined by spaces, which is what the scorers split at; those without words left out."""
    return [text for caption in captions if (text := " ".join(caption_words(caption)))]


def caption_words(caption: str) -> list[str]:
    """The words of a caption: lower case, contractions split, punctuation dropped. Empty if it has none."""
    text = " ".join(caption.split()).lower().translate(_TYPOGRAPHIC)
    return [part for token in _TOKEN.findall(text) for part in _parts(token) if part not in DROPPED]


def _parts(token: str) -> list[str]:
    if token in MERGED:
        return MERGED[token].split()
    if token in RENAMED:
        return [RENAMED[token]]
    if token == '"':
        return ["''"]
    if token.startswith("..."):
        return ["..."]
    split = _CLITIC.search(token)
    if split is None:
        return [token]
    # Twice for "shouldn't've".
    return [*_parts(token[: split.start()]), split[0]]

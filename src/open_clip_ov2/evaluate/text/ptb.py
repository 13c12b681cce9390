"""Words of a caption as COCO's caption evaluation counts them, without its Java.

The evaluation (Chen et al. 2015, Microsoft COCO Captions, section 3) lowers the case, splits with Stanford's Penn
Treebank tokenizer and drops punctuation. Rules here are the treebank's (MacIntyre, 1995: contractions split before
their clitic, brackets and quotes renamed), as far as captions need them. Compared with Stanford's CoreNLP 3.4.1, which
pycocoevalcap carries: the same words for all but 13 of 5,244 names of emoji, those with a typographic apostrophe inside
a word (straightened here). Known to differ too: abbreviations beyond ABBREVIATIONS, emoji (dropped there, words here),
fractions such as 9½ (two words there), a few slang forms.
"""

from __future__ import annotations

import re

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

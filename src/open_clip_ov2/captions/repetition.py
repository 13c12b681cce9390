"""What a text says about itself: repetition, refusals, near duplicates.

Repetition is measured by Gopher's rules (Rae et al. 2021, arXiv 2112.11446, table A1), each a share of the text's
characters: those of the commonest 2-, 3- and 4-gram, and those of all 5- to 10-grams that came before. What datatrove's
functions count is the oracle in tests/captions/test_filters.py. One deviation: an n-gram that occurs once is no
repetition. Web pages are long enough for that not to matter; of a caption of five words, any pair is more than a fifth.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

LIMIT = 0.20  # Gopher's for the commonest 2-gram; `repetition` is in its units
TOP_LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_LIMITS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
# Ours, from what instruction-tuned captioners say when they do not describe: the assistant speaks of itself or of a
# picture that it did not get.
_REFUSAL = re.compile(
    r"""\b(?:
        (?:i'm|i\ am|we're)\s+(?:really\s+|very\s+)?(?:sorry|unable|afraid|not\ able|here\ to\ help)
      | i\s+(?:can't|cannot|can\ not|won't|don't\ have|do\ not\ have|apologi[sz]e)
      | as\s+an?\s+(?:ai|artificial|large\ language|language)\b
      | (?:ai|language)\s+(?:language\s+)?model\b.{0,40}\b(?:cannot|can't|unable|not\ able)
      | (?:no|any)\s+(?:image|picture|photo)\s+(?:was|has\ been|is)\s+(?:provided|attached|uploaded|given)
      | (?:provide|upload|share|attach)\s+(?:me\s+)?(?:the|an?|your)\s+(?:image|picture|photo)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
BANDS, ROWS = 14, 8  # as FineWeb (arXiv 2406.17557): alike from some 0.75 on
SHINGLE = 3  # words; ours
_PRIME = (1 << 31) - 1  # hashes are below it, so that products fit 64 bits
_RANDOM = np.random.default_rng(0)
_FACTORS = _RANDOM.integers(1, _PRIME, (2, BANDS * ROWS, 1), dtype=np.uint64)


def words(text: str) -> list[str]:
    """Words and marks."""
    return _WORD.findall(text)


def repetition(text: str) -> float:
    """Gopher's repetition: the share of the commonest 2-gram, or what comes closer to its own limit, times 0.2 / that
    limit; so at most 0.2 exactly if a text meets all nine limits."""
    tokens = words(text)
    shares = [(_commonest(tokens, n), limit) for n, limit in TOP_LIMITS.items()]
    shares += [(_repeated(tokens, n), limit) for n, limit in REPEATED_LIMITS.items()]
    return max((LIMIT / limit * count / len(text) for count, limit in shares if count), default=0.0)


def _commonest(tokens: Sequence[str], n: int) -> int:
    """Characters of the commonest n-gram, with the spaces in it, in all its places; 0 if none comes twice."""
    found = Counter(" ".join(tokens[place : place + n]) for place in range(len(tokens) - n + 1))
    gram, count = next(iter(found.most_common(1)), ("", 0))
    return len(gram) * count if count > 1 else 0


def _repeated(tokens: Sequence[str], n: int) -> int:
    """Characters of the n-grams that came before, none of them counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = place = 0
    while place + n <= len(tokens):
        gram = tuple(tokens[place : place + n])
        if gram in seen:
            characters += sum(map(len, gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return characters


def is_refusal(text: str) -> bool:
    """Whether a model says that it cannot or will not describe."""
    return _REFUSAL.search(text.replace("’", "'")) is not None


def signature(text: str, near: bool) -> np.ndarray:
    """`(bands,)` uint64: texts that agree in any of them are duplicates of each other.

    Exact: one hash of the lower-case words. Near: MinHash (Broder 1997) of the sets of three words in a row, 14 bands
    of 8: texts whose sets share 80% are found with a chance of 92%, those that share 50% with 5%.
    """
    tokens = [token.lower() for token in words(text) if token[0].isalnum()]
    if not near:
        return np.array([_hash64(" ".join(tokens))], dtype=np.uint64)
    shingles = {" ".join(tokens[place : place + SHINGLE]) for place in range(max(1, len(tokens) - SHINGLE + 1))}
    hashes = np.array(
        [zlib.crc32(one.encode("utf-8", "surrogatepass")) % _PRIME for one in sorted(shingles)], dtype=np.uint64
    )
    least = ((_FACTORS[0] * hashes + _FACTORS[1]) % _PRIME).min(axis=1).reshape(BANDS, ROWS)
    return np.array([_hash64(band.tobytes()) for band in least], dtype=np.uint64)


def _hash64(data: str | bytes) -> int:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def later_duplicates(signatures: np.ndarray) -> np.ndarray:
    """`(N, bands)` uint64 -> `(N,)` bool: whether an earlier row has the same value in any band."""
    found = np.zeros(len(signatures), dtype=bool)
    for band in signatures.T:
        order = np.argsort(band, kind="stable")
        same = band[order][1:] == band[order][:-1]
        found[order[1:][same]] = True
    return found

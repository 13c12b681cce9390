"""OpenCLIP's built-in tokenizer, the same ids for less: a word's ids are looked up, plain text is not mended.

Shapes: B captions, L caption tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn, whitespace_clean
from torch import Tensor

MOST_WORDS = 1 << 18  # then it starts anew: web captions never run out of new ones; about 50 MB
LONGEST_WORD = 32  # characters; text without spaces, such as Chinese, would fill the memory and never come again


class CachingTokenizer(SimpleTokenizer):
    """Shares everything with the tokenizer that it is made of, which has no special tokens but the usual two.

    None of its tokens has a space within, so text may be cut at spaces first.
    """

    def __init__(self, original: SimpleTokenizer) -> None:
        self.__dict__.update(original.__dict__)
        self._ids: dict[str, tuple[int, ...]] = {}
        self._lowers = self.clean_fn is get_clean_fn("lower")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": {}}

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Int64 `(B, L)`, zeros after the end token."""
        length = context_length or self.context_length
        if self.reduction_fn is not None or isinstance(texts, str) or not length:
            return super().__call__(texts, context_length)
        ids_BL = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)][: length - 1]
            row[: len(ids) + 1] = *ids, self.eot_token_id
        return torch.from_numpy(ids_BL)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._cleaned(text).split(" "):
            known = self._ids.get(word)
            ids += self._encode_word(word) if known is None else known
        return ids

    def _cleaned(self, text: str) -> str:
        # Of printable ASCII, ftfy and html.unescape change nothing but entities, which have an ampersand.
        if self._lowers and text.isascii() and text.isprintable() and "&" not in text:
            return whitespace_clean(text).lower()
        return self.clean_fn(text)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids = tuple(
            self.encoder[piece]
            for part in self.pat.findall(word)
            for piece in self.bpe("".join(self.byte_encoder[byte] for byte in part.encode())).split(" ")
        )
        if len(word) <= LONGEST_WORD:
            if len(self._ids) >= MOST_WORDS:
                self._ids.clear()
            self._ids[word] = ids
        return ids


def caching(tokenizer: Any) -> Any:
    """The same, faster, if it is OpenCLIP's built-in one and no variant of it; anything else as it is."""
    plain = type(tokenizer) is SimpleTokenizer and len(tokenizer.all_special_ids) == 2
    return CachingTokenizer(tokenizer) if plain else tokenizer

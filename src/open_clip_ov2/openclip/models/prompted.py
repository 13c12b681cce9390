"""Captions with a prompt before them, as a captioner that is given text reads them.

Shapes: L tokens. A row is [bos] prompt caption [eos] padding, with the ids of the prompt as -1 - id: the decoder reads
them, and they are no targets of the loss (core/loss.py, core/packing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from open_clip_ov2.data.captions import PROMPT_END
from open_clip_ov2.openclip.models.tokenizer import eos_id_of


def most_prompt_ids(context_length: int) -> int:
    """Tokens that a prompt has at most, bos included: half of the context, so that the caption has the other half."""
    return context_length // 2


def without_end(row_L: Tensor, eos_id: int) -> Tensor:
    """Bos and text, without the end and what follows it."""
    ends = (row_L == eos_id).nonzero()
    return row_L[: int(ends[0])] if len(ends) else row_L


class PromptTokenizer:
    """Ids of texts that the decoder of samples joins as prompt, PROMPT_END and caption."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id_of(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Int64 `(B, L)`; a caption that is cut ends in eos."""
        parts = [text.partition(PROMPT_END) for text in texts]
        out_BL = self._tokenizer([caption for _, _, caption in parts])
        prompts_BL = self._tokenizer([prompt for prompt, _, _ in parts])
        for row_L, prompt_L in zip(out_BL, prompts_BL, strict=True):
            prompt = without_end(prompt_L, self._eos_id)[1 : most_prompt_ids(len(row_L))]
            caption_L = row_L[1:].clone()
            row_L[1 : 1 + len(prompt)] = -1 - prompt
            row_L[1 + len(prompt) :] = caption_L[: len(row_L) - 1 - len(prompt)]
            if not bool((row_L == self._eos_id).any()):
                row_L[-1] = self._eos_id
        return out_BL

"""Images and captions that all contenders get alike.

Shapes: B batch, R resolution in px, L caption tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from open_clip_ov2.compare.bench.cases import CaptionLengths

CONCENTRATION = 4.0  # of the Beta distribution of lengths, ours: most captions near the mean, all lengths occur


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokenizer; words are drawn from all others."""

    size: int
    bos_id: int
    eos_id: int
    pad_id: int


def caption_lengths(count: int, lengths: CaptionLengths, seed: int) -> list[int]:
    """`low` to `high`, by a Beta distribution whose mean is `mean`."""
    span = lengths.high - lengths.low
    share = (lengths.mean - lengths.low) / span if span else 0.0
    if share in (0.0, 1.0):
        return [lengths.low if share == 0.0 else lengths.high] * count
    rng = random.Random(seed)
    a, b = CONCENTRATION * share, CONCENTRATION * (1 - share)
    return [round(lengths.low + span * rng.betavariate(a, b)) for _ in range(count)]


def synthetic_batch(
    batch_size: int, resolution: int, context_length: int, lengths: CaptionLengths, words: Vocabulary, seed: int
) -> tuple[Tensor, Tensor]:
    """Images `(B, 3, R, R)` uint8, noise, and ids `(B, L)` int64, padded; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, resolution, resolution)
    images_B3RR = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    special = {words.bos_id, words.eos_id, words.pad_id}
    usable = torch.tensor([word for word in range(words.size) if word not in special])
    drawn_BL = usable[torch.randint(len(usable), (batch_size, lengths.high), generator=generator)]
    texts_BL = torch.full((batch_size, context_length), words.pad_id)
    for row, length in enumerate(caption_lengths(batch_size, lengths, seed)):
        end = min(length, context_length)  # as tokenizers do, the end of text stands at the last place then
        texts_BL[row, :end] = drawn_BL[row, :end]
        texts_BL[row, 0], texts_BL[row, end - 1] = words.bos_id, words.eos_id
    return images_B3RR, texts_BL

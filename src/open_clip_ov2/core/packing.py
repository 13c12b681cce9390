"""The captions of a batch side by side, without padding.

Shapes: B batch, L caption tokens, P = L - 1 positions, t positions of all rows together, R real targets among them.
What works token by token runs over all t positions at once; attention runs row by row, or by groups of captions of
similar length (core/rows.py). Loss and gradient of a step stay the same, since rows of a batch do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.core.loss import IGNORE_INDEX, caption_targets
from open_clip_ov2.core.rows import Parts

# Positions that a group has on average at least. Measured: `ov2 bench` with other values. Half precision on a GPU
# has a kernel for rows of any length (core/rows.py), so every row is a group there.
CPU_TOKENS, GPU_TOKENS, GPU_HALF_TOKENS = 128, 4096, 1


@dataclass(frozen=True)
class PackedCaptions:
    """What the decoder reads and is to predict; all int64.

    `order_B`: the batch's rows, longest captions first. `parts`: (rows, positions) of each group in that order.
    `ids_t`: the decoder's inputs, group by group, row by row. `index_R`: where among those the real targets stand;
    `labels_R`: the targets.
    """

    order_B: Tensor
    parts: Parts
    ids_t: Tensor
    index_R: Tensor
    labels_R: Tensor

    @property
    def num_targets(self) -> int:
        return len(self.labels_R)

    def to(self, device: torch.device) -> PackedCaptions:
        """Copied to the device. The host does not wait: it copies from pinned memory."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
                moved[name] = pinned.to(device, non_blocking=True)
        return replace(self, **moved)


def pack_captions(texts_BL: Tensor, eos_id: int, min_tokens: int) -> PackedCaptions:
    """Groups of equally many rows, with at least `min_tokens` positions in a group on average.

    `texts_BL` int64 `[bos] caption [eos] padding`, on the CPU, so that no device is waited for. A prompt's ids,
    stored as -1 - id, are read and are no targets.
    """
    labels_BP = caption_targets(texts_BL, eos_id)
    is_prompt_BL = texts_BL < 0
    texts_BL = torch.where(is_prompt_BL, -1 - texts_BL, texts_BL)
    read_B = (labels_BP != IGNORE_INDEX).sum(dim=1) + is_prompt_BL.sum(dim=1)  # positions that are read
    order_B = read_B.argsort(descending=True, stable=True)
    batch, positions = labels_BP.shape
    rows = -(-batch // max(1, min(batch, int(read_B.sum()) // min_tokens)))
    longest = read_B[order_B[::rows]].clamp(min=1)  # of each group its first
    lengths_B = longest.repeat_interleave(rows)[:batch]
    computed_BP = torch.arange(positions) < lengths_B[:, None]
    ids_t, labels_t = texts_BL[order_B, :-1][computed_BP], labels_BP[order_B][computed_BP]
    counts = [rows] * (len(longest) - 1) + [batch - rows * (len(longest) - 1)]
    index_R = (labels_t != IGNORE_INDEX).nonzero()[:, 0]
    return PackedCaptions(order_B, tuple(zip(counts, longest.tolist(), strict=True)), ids_t, index_R, labels_t[index_R])

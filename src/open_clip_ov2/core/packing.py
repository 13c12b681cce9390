"""The captions of a batch side by side, without padding.

Shapes: B batch, L caption tokens, P = L - 1 positions, t positions of all rows together, R real targets among them.
What works token by token runs over all t positions at once; attention runs row by row, or by groups of captions of
similar length (core/rows.py). Loss and gradient of a step stay the same, since rows of a batch do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.core.loss import IGNORE_INDEX, caption_targets
from open_clip_ov2.core.rows import Parts, on_device

# Positions that a group has on average at least. Measured: `ov2 bench` with other values. Half precision on a GPU
# has a kernel for rows of any length (core/rows.py), so every row is a group there.
CPU_TOKENS, GPU_TOKENS, GPU_HALF_TOKENS = 128, 4096, 1


@dataclass(frozen=True)
class PackedCaptions:
    """What the decoder reads and is to predict; all int64. `order_B`: the batch's rows, longest captions first.
    `parts`: (rows, positions) of each group in that order. `ids_t`: the decoder's inputs, group by group, row by row.
    `index_R`: where among those the real targets stand; `labels_R`: the targets. `order`: `order_B` on the host."""

    order_B: Tensor
    parts: Parts
    ids_t: Tensor
    index_R: Tensor
    labels_R: Tensor
    order: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        return len(self.labels_R)

    def to(self, device: torch.device) -> PackedCaptions:
        """Copied to the device. The host does not wait: it copies from pinned memory."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: on_device(value, device) for name, value in tensors.items()}
        return replace(self, **moved)


def pack_captions(
    texts_BL: Tensor, eos_id: int, min_tokens: int, images: Sequence[int] | None = None
) -> PackedCaptions:
    """Groups of equally many rows, with at least `min_tokens` positions in a group on average. `texts_BL` int64 `[bos]
    caption [eos] padding`, on the CPU, so that no device is waited for. A prompt's ids, stored as -1 - id, are read and
    are no targets. `images`: patches of each image, where they differ; a group then has images of one size."""
    labels_BP = caption_targets(texts_BL, eos_id)
    is_prompt_BL = texts_BL < 0
    texts_BL = torch.where(is_prompt_BL, -1 - texts_BL, texts_BL)
    read_B = (labels_BP != IGNORE_INDEX).sum(dim=1) + is_prompt_BL.sum(dim=1)  # positions that are read
    sizes_B = torch.zeros_like(read_B) if images is None else torch.tensor(images)
    found = [_grouped(read_B, (sizes_B == size).nonzero()[:, 0], min_tokens) for size in sizes_B.unique()]
    order_B = torch.cat([order for order, _ in found])
    parts = tuple(part for _, of in found for part in of)
    lengths_B = torch.tensor([length for rows, length in parts for _ in range(rows)])
    computed_BP = torch.arange(labels_BP.shape[1]) < lengths_B[:, None]
    ids_t, labels_t = texts_BL[order_B, :-1][computed_BP], labels_BP[order_B][computed_BP]
    index_R = (labels_t != IGNORE_INDEX).nonzero()[:, 0]
    return PackedCaptions(order_B, parts, ids_t, index_R, labels_t[index_R], tuple(order_B.tolist()))


def _grouped(read_B: Tensor, rows_b: Tensor, min_tokens: int) -> tuple[Tensor, Parts]:
    """These rows, longest captions first, and groups of them."""
    order_b = rows_b[read_B[rows_b].argsort(descending=True, stable=True)]
    batch = len(order_b)
    rows = -(-batch // max(1, min(batch, int(read_B[order_b].sum()) // min_tokens)))
    longest = read_B[order_b[::rows]].clamp(min=1)  # of each group its first
    counts = [rows] * (len(longest) - 1) + [batch - rows * (len(longest) - 1)]
    return order_b, tuple(zip(counts, longest.tolist(), strict=True))

"""Captions of one batch in groups of similar length, so that next to nothing is computed for padding.

Shapes: B batch, L caption tokens (core/__init__.py). Which samples a step sees, and its gradient, stay the same: rows
of a batch do not see each other, and the decoder alone runs group by group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_clip_ov2.core.loss import IGNORE_INDEX, caption_targets

LENGTH_STEP = 8  # lengths are rounded up to it: few shapes, and rows that start at an aligned address
# Caption tokens that a group has at least. CPU: measured, docs/performance.md. GPU: enough to fill its matrix units.
CPU_TOKENS, GPU_TOKENS = 256, 16_384


@dataclass(frozen=True)
class LengthGroups:
    """`order_B` int64: the batch's rows, longest captions first. `parts`: (rows, ids) of each group in that order,
    ids with bos and eos, a multiple of LENGTH_STEP unless the context is shorter. `num_targets`: real ones."""

    order_B: Tensor
    parts: tuple[tuple[int, int], ...]
    num_targets: int

    def to(self, device: torch.device) -> LengthGroups:
        return LengthGroups(self.order_B.to(device, non_blocking=True), self.parts, self.num_targets)


def length_groups(texts_BL: Tensor, eos_id: int, min_tokens: int) -> LengthGroups:
    """Groups of equal numbers of rows, as many as leave `min_tokens` caption tokens to each on average.

    `texts_BL` int64 on the CPU: nothing here asks a device. Equal rows and stepped lengths keep the number of
    different shapes small, which a compiled block needs.
    """
    targets_B = (caption_targets(texts_BL, eos_id) != IGNORE_INDEX).sum(dim=1)
    num_targets = int(targets_B.sum())
    order_B = targets_B.argsort(descending=True, stable=True)
    batch, context = texts_BL.shape
    rows = -(-batch // max(1, min(batch, num_targets // min_tokens)))
    longest = targets_B[order_B[::rows]].tolist()
    sizes = [len(part) for part in order_B.split(rows)]
    parts = [(size, min(context, stepped(length + 1))) for size, length in zip(sizes, longest, strict=True)]
    return LengthGroups(order_B, tuple(parts), num_targets)


def stepped(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP

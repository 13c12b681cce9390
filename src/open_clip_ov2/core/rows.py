"""Attention among rows of unequal length that lie side by side without padding.

Shapes: B rows, K image tokens of each, t caption positions of all rows together, T = B K + t tokens, image tokens
of all rows first; D width, H heads, d = D / H (core/__init__.py). Keys and values of a token stand side by side, `2 D`.
There are two ways to the same result: group by group with torch's attention, or all rows at once on GPUs with the
kernel for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

from open_clip_ov2.core.attention import scaled_dot_product, takes_half_kernels

Parts = tuple[tuple[int, int], ...]  # (rows, caption positions of each) of every group, in order


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each `(B, H, C, d)`."""

    key: Tensor
    value: Tensor


def split_heads(x_BSD: Tensor, heads: int) -> Tensor:
    """`(B, S, D)` -> `(B, H, S, d)`."""
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


def key_value(kv_BS2D: Tensor, heads: int) -> KeyValue:
    key_BSD, value_BSD = kv_BS2D.chunk(2, dim=-1)
    return KeyValue(split_heads(key_BSD, heads), split_heads(value_BSD, heads))


def attend(q_BSD: Tensor, kv: KeyValue, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`(B, S, D)` -> the same. `mask` boolean `(S, C)`, True where attention is allowed."""
    q_BHSd = split_heads(q_BSD, heads)
    if mask is None:
        out = scaled_dot_product(q_BHSd, kv.key, kv.value, causal=causal)
    else:
        out = F.scaled_dot_product_attention(q_BHSd, kv.key, kv.value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def prefix_mask(prefix: int, total: int, device: torch.device | None = None) -> Tensor:
    """`(S, S)` boolean, True where allowed: all see the whole prefix, the rest also what came before."""
    mask_SS = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask_SS[:, :prefix] = True
    return mask_SS


def packed_rows(num_image: int, parts: Parts, like: Tensor, head_width: int) -> Rows:
    """Rows for the device and dtype of `like` `(B, K, D)`. Captions follow `num_image` image tokens of their row."""
    lengths = [positions for rows, positions in parts for _ in range(rows)]
    if takes_half_kernels(like, head_width):
        return RaggedRows.of(num_image, lengths, like.device)
    return GroupedRows(len(lengths), num_image, parts, like.device)


class GroupedRows:
    """One call for each group of rows of the same length."""

    def __init__(self, batch: int, num_image: int, parts: Parts, device: torch.device) -> None:
        self.batch, self.num_image, self.parts = batch, num_image, parts
        self.num_captions = sum(rows * positions for rows, positions in parts)
        self._sizes = [rows * positions for rows, positions in parts]
        self._rows = [rows for rows, _ in parts]
        self._masks = [_caption_mask(num_image, positions, device) for _, positions in parts]

    def after_image(self, q_tD: Tensor, kv_T2D: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Attention of the captions to the image tokens of their row and to the caption so far, `(t, D)`; and the keys
        and values of the image tokens alone, `(B K, 2 D)`."""
        image_kv, *captions = kv_T2D.split([self.batch * self.num_image, *self._sizes])
        images = image_kv.unflatten(0, (self.batch, self.num_image)).split(self._rows)
        out = []
        for q, kv, image, part, mask in zip(
            q_tD.split(self._sizes), captions, images, self.parts, self._masks, strict=True
        ):
            whole = torch.cat([image, kv.unflatten(0, part)], dim=1)
            out.append(attend(q.unflatten(0, part), key_value(whole, heads), heads, mask).flatten(0, 1))
        return torch.cat(out), image_kv

    def across(self, q_tD: Tensor, context_BK2D: Tensor, heads: int) -> Tensor:
        """Attention of the captions to all of the context of their row, `(t, D)`."""
        parts = zip(q_tD.split(self._sizes), context_BK2D.split(self._rows), self.parts, strict=True)
        out = [attend(q.unflatten(0, part), key_value(kv, heads), heads).flatten(0, 1) for q, kv, part in parts]
        return torch.cat(out)


def _caption_mask(before: int, length: int, device: torch.device) -> Tensor:
    """`(length, before + length)`: captions see `before` image tokens, and what came before in the caption."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return causal_lower_right(length, before + length)  # a form that fused kernels know, without a mask in memory
    return prefix_mask(before, before + length, device)[before:]


@dataclass(frozen=True)
class RaggedRows:
    """One call for all rows: FlashAttention-2 takes the position at which each row begins.

    `starts_q`, `starts_k` `(B + 1,)` int32: of the captions' queries, and of the rows' keys, image tokens before the
    caption. `place_T` int64: where each token stands among those keys; `source_T`: the other way round.
    """

    batch: int
    num_image: int
    num_captions: int
    longest: int
    starts_q: Tensor
    starts_k: Tensor
    place_T: Tensor
    source_T: Tensor

    @classmethod
    def of(cls, num_image: int, lengths: list[int], device: torch.device) -> RaggedRows:
        """Made on the device without waiting for it."""
        on_host = torch.tensor(lengths)
        lengths_B = (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)
        batch, captions = len(lengths), sum(lengths)
        rows_B = torch.arange(batch + 1, device=device)
        starts_q = F.pad(lengths_B.cumsum(0), (1, 0))
        starts_k = starts_q + num_image * rows_B
        row_t = torch.repeat_interleave(rows_B[:-1], lengths_B, output_size=captions)
        images_BK = starts_k[:-1, None] + torch.arange(num_image, device=device)
        captions_t = torch.arange(captions, device=device) + num_image * (row_t + 1)
        place_T = torch.cat([images_BK.flatten(), captions_t])
        source_T = torch.empty_like(place_T).scatter_(0, place_T, torch.arange(len(place_T), device=device))
        return cls(batch, num_image, captions, max(lengths), starts_q.int(), starts_k.int(), place_T, source_T)

    def after_image(self, q_tD: Tensor, kv_T2D: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """As GroupedRows'."""
        kv_by_row_T2D, image_kv = _ByRow.apply(kv_T2D, self.source_T, self.place_T, self.batch * self.num_image)
        most = self.num_image + self.longest
        return self._flash(q_tD, kv_by_row_T2D, self.starts_k, most, heads, causal=True), image_kv

    def across(self, q_tD: Tensor, context_BK2D: Tensor, heads: int) -> Tensor:
        """As GroupedRows'."""
        batch, context, _ = context_BK2D.shape
        starts_k = torch.arange(0, (batch + 1) * context, context, dtype=torch.int32, device=q_tD.device)
        return self._flash(q_tD, context_BK2D.flatten(0, 1), starts_k, context, heads, causal=False)

    def _flash(self, q_tD: Tensor, kv: Tensor, starts_k: Tensor, most: int, heads: int, *, causal: bool) -> Tensor:
        """A causal query sees the keys of its row up to its own, the last query the last key."""
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q_tD, *kv.chunk(2, dim=-1)))
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, self.starts_q, starts_k, self.longest, most, 0.0, causal, False
        )
        return out.flatten(1)


class _ByRow(torch.autograd.Function):
    """The tokens in the order of their rows; and the first `first` tokens as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place)
        ctx.first = first
        ctx.set_materialize_grads(False)
        return x.index_select(0, source), x[:first]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_by_row: Tensor, d_first: Tensor | None) -> tuple[Any, ...]:
        (place,) = ctx.saved_tensors
        d_x = d_by_row.index_select(0, place)
        if d_first is not None:  # None in a last block, which does not use them
            d_x[: ctx.first] += d_first
        return d_x, None, None, None


Rows = GroupedRows | RaggedRows

"""Attention among rows of unequal length that lie side by side without padding.

Shapes: B rows, q queries and k keys of all rows together; of the decoder's rows I image tokens, t caption positions,
T = I + t tokens, image tokens of all rows first; D width, H heads, d = D / H (core/__init__.py). Keys and values of a
token stand side by side, `2 D`.
There are two ways to the same result: equal rows at once with torch's attention, or all rows at once on GPUs with the
kernel for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
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


class RaggedTokens(NamedTuple):
    """The tokens of images that have different numbers of them, side by side: `(I, D)`, and how many each has."""

    tokens_ID: Tensor
    counts: tuple[int, ...]

    def stacked(self) -> Tensor:
        """`(B, K, D)`. Raises ValueError if the images differ in their number of tokens."""
        if len(set(self.counts)) > 1:
            raise ValueError(f"images of {sorted(set(self.counts))} tokens cannot be stacked; take equal ones together")
        return self.tokens_ID.unflatten(0, (len(self.counts), self.counts[0]))


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


@dataclass(frozen=True)
class RowAttention:
    """Attention of the queries of each row to the keys of the same row.

    `runs`: (rows, queries, keys of each) of consecutive rows that are alike; each is one call, with its mask. `starts`:
    where each row's queries and keys begin, `(2, B + 1)` int32, for FlashAttention-2, which takes all rows in one call;
    None where there is no such kernel, and where one call of torch's attention does as well. `causal`: the last query
    sees all keys, and each query before it one key less.
    """

    runs: tuple[tuple[int, int, int], ...]
    causal: bool
    masks: tuple[Tensor | None, ...]
    starts: Tensor | None

    @classmethod
    def of(
        cls, queries: Sequence[int], keys: Sequence[int], like: Tensor, head_width: int, *, causal: bool = False
    ) -> RowAttention:
        """Of so many queries and keys in each row, for the device and dtype of `like`, which is not waited for."""
        pairs = groupby(zip(queries, keys, strict=True))
        runs = tuple((sum(1 for _ in same), *pair) for pair, same in pairs)
        plain = [not causal or q == k for _, q, k in runs]
        if takes_half_kernels(like, head_width) and plain != [True]:
            starts = F.pad(on_device([queries, keys], like.device).cumsum(1), (1, 0)).int()
            return cls(runs, causal, (None,) * len(runs), starts)
        masks = [
            None if fine else _causal_mask(k - q, q, like.device) for fine, (_, q, k) in zip(plain, runs, strict=True)
        ]
        return cls(runs, causal, tuple(masks), None)

    def __call__(self, q_qD: Tensor, kv_k2D: Tensor, heads: int) -> Tensor:
        """`(q, D)`."""
        if self.starts is not None:
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q_qD, *kv_k2D.chunk(2, dim=-1)))
            return self._flash(q, k, v, max(run[1] for run in self.runs), max(run[2] for run in self.runs)).flatten(1)
        kv = kv_k2D.split([rows * keys for rows, _, keys in self.runs])
        return self.by_runs(q_qD, [part.unflatten(0, run[::2]) for part, run in zip(kv, self.runs, strict=True)], heads)

    def by_runs(self, q_qD: Tensor, kv: Sequence[Tensor], heads: int) -> Tensor:
        """The same with the keys and values `(rows, keys, 2 D)` of each run."""
        queries = q_qD.split([rows * queries for rows, queries, _ in self.runs])
        out = [
            attend(q.unflatten(0, run[:2]), key_value(own, heads), heads, mask, self.causal and mask is None)
            for q, own, run, mask in zip(queries, kv, self.runs, self.masks, strict=True)
        ]
        return torch.cat([one.flatten(0, 1) for one in out])

    def _flash(self, q_qHd: Tensor, k_kHd: Tensor, v_kHd: Tensor, most_q: int, most_k: int) -> Tensor:
        assert self.starts is not None
        out, *_ = torch.ops.aten._flash_attention_forward(
            q_qHd, k_kHd, v_kHd, self.starts[0], self.starts[1], most_q, most_k, 0.0, self.causal, False
        )
        return out


def _causal_mask(before: int, length: int, device: torch.device) -> Tensor:
    """`(length, before + length)`: each token sees the `before` tokens of a prefix, and those up to itself."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return causal_lower_right(length, before + length)  # a form that fused kernels know, without a mask in memory
    return prefix_mask(before, before + length, device)[before:]


class Rows:
    """The decoder's rows: the image tokens of each, then its caption. `images`: attention of image tokens among
    themselves; `captions`: of a caption to what stands before it in its row and to itself; `context`: of a caption to
    image tokens that are not in the sequence (cross-attention)."""

    def __init__(
        self, images: Sequence[int], parts: Parts, like: Tensor, head_width: int, *, fusion: str = "prefix"
    ) -> None:
        """`images`: image tokens of each row, in the order of `parts`; `like`: of the device and dtype."""
        lengths = [positions for rows, positions in parts for _ in range(rows)]
        within = (0,) * len(lengths) if fusion == "cross_attn" else images
        before = [image + length for image, length in zip(within, lengths, strict=True)]
        self.num_image, self.num_captions = sum(within), sum(lengths)
        self.captions = RowAttention.of(lengths, before, like, head_width, causal=True)
        if fusion == "cross_attn":
            self.context = RowAttention.of(lengths, images, like, head_width)
        else:
            self.images = RowAttention.of(images, images, like, head_width, causal=fusion == "causal")
            if self.captions.starts is not None:
                self._place_T, self._source_T = by_row(images, lengths, like.device)

    def after_image(self, q_tD: Tensor, kv_T2D: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """What captions find among the image tokens of their row and in the caption so far, `(t, D)`; and the keys and
        values of the image tokens alone, `(I, 2 D)`."""
        if not self.num_image:
            return self.captions(q_tD, kv_T2D, heads), kv_T2D[:0]
        if self.captions.starts is not None:
            kv_by_row_T2D, image_kv = _ByRow.apply(kv_T2D, self._source_T, self._place_T, self.num_image)
            return self.captions(q_tD, kv_by_row_T2D, heads), image_kv
        image_kv, captions_kv = kv_T2D.split([self.num_image, self.num_captions])
        runs = self.captions.runs
        parts = zip(
            image_kv.split([rows * (keys - own) for rows, own, keys in runs]),
            captions_kv.split([rows * own for rows, own, _ in runs]),
            runs,
            strict=True,
        )
        kv = [torch.cat([part.unflatten(0, (run[0], -1)) for part in (image, own)], dim=1) for image, own, run in parts]
        return self.captions.by_runs(q_tD, kv, heads), image_kv


def by_row(first: Sequence[int], second: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For tokens of which the first part of all rows comes before the second part of all rows: where each stands when
    the rows stand one after the other, and which token stands at each place; `(T,)` int64, made on the device."""
    counts_2B, totals = on_device([first, second], device), (sum(first), sum(second))
    starts_2B = F.pad(counts_2B.cumsum(1), (1, 0))
    skipped = (starts_2B[1, :-1], starts_2B[0, 1:])  # tokens of the other kind that come before, of each row
    place_T = torch.cat([
        torch.arange(total, device=device) + torch.repeat_interleave(others_B, counts_B, output_size=total)
        for others_B, counts_B, total in zip(skipped, counts_2B, totals, strict=True)
    ])  # fmt: skip
    return place_T, torch.empty_like(place_T).scatter_(0, place_T, torch.arange(len(place_T), device=device))


def on_device(values: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """A copy of what is on the host, which does not wait for it; lists of integers become int64."""
    on_host = torch.as_tensor(values)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


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

"""Transformer blocks of the text decoder, with a key-value cache for generation.

Shapes: B batch, S sequence, D width, H heads, C cached positions (core/__init__.py); K image tokens of a row, T tokens
of all rows together, image tokens first, t caption tokens among them (core/packing.py).
Parameter names are those of the released PyTorch caption decoders (docs/reference.md): `ln_1`, `attn.in_proj_*`,
`attn.out_proj`, `ln_2`, `mlp.c_fc`, `mlp.c_proj`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # flax's LayerNorm, as the reference uses it


class KeyValue(NamedTuple):
    """Cached keys and values of one attention layer, each `(B, H, C, D/H)`."""

    key: Tensor
    value: Tensor

    def reorder(self, rows: Tensor) -> KeyValue:
        """The cache of the given rows of the batch, `(B',)` int64."""
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its weights, result in the dtype of its input (low-precision weights)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps).to(
            x.dtype
        )


class PackedRows(NamedTuple):
    """Where each token of a packed batch stands: `(B, K)` image tokens row by row, then captions group by group.

    `masks`: one a group, `(positions, K + positions)`, in a form that attention takes.
    """

    batch: int
    num_image: int  # of a row; 0 where captions alone are packed
    parts: tuple[tuple[int, int], ...]  # (rows, positions) of each group
    masks: tuple[Tensor, ...]

    @property
    def caption_sizes(self) -> list[int]:
        return [rows * positions for rows, positions in self.parts]

    @property
    def first_caption(self) -> int:
        return self.batch * self.num_image


class Attention(nn.Module):
    """Multi-head attention `(..., D)`; keys and values from the sequence itself or from a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor, first: int, stop: int) -> Tensor:
        """`(..., D)` -> `(..., (stop - first) D)`: projections `first` to `stop` of (query, key, value)."""
        rows = slice(first * x.shape[-1], stop * x.shape[-1])
        return F.linear(x, self.in_proj_weight[rows].to(x.dtype), self.in_proj_bias[rows].to(x.dtype))

    def split(self, x_BSD: Tensor) -> Tensor:
        """`(B, S, D)` -> `(B, H, S, D/H)`."""
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def key_value(self, kv_BS2D: Tensor) -> KeyValue:
        key_BSD, value_BSD = kv_BS2D.chunk(2, dim=-1)
        return KeyValue(self.split(key_BSD), self.split(value_BSD))

    def attend(self, q_BSD: Tensor, kv: KeyValue, mask: Tensor | None, causal: bool) -> Tensor:
        """`(B, S, D)`, before the output projection. `mask` boolean `(S, C)`, True where attention is allowed."""
        out = F.scaled_dot_product_attention(self.split(q_BSD), kv.key, kv.value, attn_mask=mask, is_causal=causal)
        return out.transpose(1, 2).flatten(2)

    def attend_packed(self, q: Tensor, kv_T2D: Tensor, rows: PackedRows, image_causal: bool) -> Tensor:
        """`(T, D)` queries, or `(t, D)` of the captions alone -> the same: image tokens see those of their row, caption
        tokens those and the captions before them."""
        image_kv, *caption_kv = kv_T2D.split([rows.first_caption, *rows.caption_sizes])
        image_kv_BK2D = image_kv.unflatten(0, (rows.batch, rows.num_image))
        queries = q.split([len(q) - sum(rows.caption_sizes), *rows.caption_sizes])
        out = []
        if len(queries[0]):
            q_BKD = queries[0].unflatten(0, (rows.batch, rows.num_image))
            out.append(self.attend(q_BKD, self.key_value(image_kv_BK2D), None, image_causal).flatten(0, 1))
        of_image = image_kv_BK2D.split([count for count, _ in rows.parts])
        for q_tD, kv, before, part, mask in zip(queries[1:], caption_kv, of_image, rows.parts, rows.masks, strict=True):
            all_kv = torch.cat([before, kv.unflatten(0, part)], dim=1)
            out.append(self.attend(q_tD.unflatten(0, part), self.key_value(all_kv), mask, False).flatten(0, 1))
        return torch.cat(out)


def _mlp(width: int, mlp_width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, mlp_width),
            gelu=nn.GELU(approximate="tanh"),  # the encoder's is exact, the decoder's is not (docs/reference.md)
            c_proj=nn.Linear(mlp_width, width),
        )
    )


class SelfBlock(nn.Module):
    """Pre-norm self-attention and MLP. `before` and `after` attention work token by token, whatever the rows."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = _mlp(width, mlp_width)

    def before(self, x_TD: Tensor) -> Tensor:
        """Queries, keys and values, `(T, 3 D)`."""
        return self.attn.project(self.ln_1(x_TD), 0, 3)

    def before_last(self, x_TD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Queries of the tokens from `first` on, `(t, D)`, and keys and values of all, `(T, 2 D)`."""
        x_TD = self.ln_1(x_TD)
        return self.attn.project(x_TD[first:], 0, 1), self.attn.project(x_TD, 1, 3)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn.out_proj(attended)
        return x + self.mlp(self.ln_2(x))

    def compile_tokenwise(self, **options: Any) -> None:
        """With torch.compile, for any number of tokens; attention stays outside."""
        self.before = torch.compile(self.before, dynamic=True, **options)  # type: ignore[method-assign]
        self.before_last = torch.compile(self.before_last, dynamic=True, **options)  # type: ignore[method-assign]
        self.after = torch.compile(self.after, dynamic=True, **options)  # type: ignore[method-assign]

    def packed(self, x_TD: Tensor, rows: PackedRows, image_causal: bool) -> Tensor:
        """`(T, D)` -> `(T, D)`."""
        q_TD, kv_T2D = self.before(x_TD).split([x_TD.shape[-1], 2 * x_TD.shape[-1]], dim=-1)
        return self.after(x_TD, self.attn.attend_packed(q_TD, kv_T2D, rows, image_causal))

    def packed_last(self, x_TD: Tensor, rows: PackedRows) -> Tensor:
        """`(T, D)` -> `(t, D)`: for the captions alone, where nobody reads what the image tokens become."""
        q_tD, kv_T2D = self.before_last(x_TD, rows.first_caption)
        return self.after(x_TD[rows.first_caption :], self.attn.attend_packed(q_tD, kv_T2D, rows, False))

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None = None, causal: bool = False, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """For generation: with the keys and values. `mask` boolean, True where attention is allowed, `(S, C + S)`."""
        q_BSD, kv_BS2D = self.before(x_BSD).split([x_BSD.shape[-1], 2 * x_BSD.shape[-1]], dim=-1)
        kv = self.attn.key_value(kv_BS2D)
        if past is not None:
            kv = KeyValue(torch.cat([past.key, kv.key], dim=2), torch.cat([past.value, kv.value], dim=2))
        return self.after(x_BSD, self.attn.attend(q_BSD, kv, mask, causal)), kv

    def project(self, x_BSD: Tensor) -> KeyValue:
        """Keys and values alone, of positions whose outputs nobody reads."""
        return self.attn.key_value(self.attn.project(self.ln_1(x_BSD), 1, 3))


class CrossBlock(nn.Module):
    """Pre-norm cross-attention to the image tokens and MLP (reference: text_decoder_v2.py, ln_x, ln_u, ln_mlp)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.ln_context = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = _mlp(width, mlp_width)

    def project_context(self, context_BKD: Tensor) -> KeyValue:
        return self.attn.key_value(self.context(context_BKD))

    def context(self, context_BKD: Tensor) -> Tensor:
        """Keys and values of the image tokens, `(B, K, 2 D)`."""
        return self.attn.project(self.ln_context(context_BKD), 1, 3)

    def before(self, x: Tensor) -> Tensor:
        """Queries, `(..., D)`."""
        return self.attn.project(self.ln_1(x), 0, 1)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn.out_proj(attended)
        return x + self.mlp(self.ln_2(x))

    def compile_tokenwise(self, **options: Any) -> None:
        """As SelfBlock's."""
        self.before = torch.compile(self.before, dynamic=True, **options)  # type: ignore[method-assign]
        self.context = torch.compile(self.context, dynamic=True, **options)  # type: ignore[method-assign]
        self.after = torch.compile(self.after, dynamic=True, **options)  # type: ignore[method-assign]

    def packed(self, x_tD: Tensor, context_BKD: Tensor, rows: PackedRows) -> Tensor:
        """Captions `(t, D)`, image tokens `(B, K, D)` -> `(t, D)`."""
        queries = self.before(x_tD).split(rows.caption_sizes)
        contexts = self.context(context_BKD).split([count for count, _ in rows.parts])
        attended = [
            self.attn.attend(q.unflatten(0, part), self.attn.key_value(kv), None, False).flatten(0, 1)
            for q, kv, part in zip(queries, contexts, rows.parts, strict=True)
        ]
        return self.after(x_tD, torch.cat(attended))

    def forward(self, x_BSD: Tensor, kv: KeyValue) -> Tensor:
        """For generation; `kv` from `project_context`."""
        return self.after(x_BSD, self.attn.attend(self.before(x_BSD), kv, None, False))

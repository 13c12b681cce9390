"""Transformer blocks of the text decoder, with a key-value cache for generation.

Shapes: B batch, S sequence, D width, H heads, C cached positions (core/__init__.py).
Parameter names are those of the released PyTorch caption decoders (docs/reference.md): `ln_1`, `attn.in_proj_*`,
`attn.out_proj`, `ln_2`, `mlp.c_fc`, `mlp.c_proj`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

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


class Attention(nn.Module):
    """Multi-head attention `(B, S, D)`; keys and values from the sequence itself or from a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def _split(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _project(self, x_BSD: Tensor, first: int, stop: int) -> tuple[Tensor, ...]:
        """Projections `first` to `stop` of (query, key, value), each `(B, H, S, D/H)`."""
        width = x_BSD.shape[-1]
        rows = slice(first * width, stop * width)
        weight, bias = self.in_proj_weight[rows].to(x_BSD.dtype), self.in_proj_bias[rows].to(x_BSD.dtype)
        return tuple(self._split(part) for part in F.linear(x_BSD, weight, bias).chunk(stop - first, dim=-1))

    def _attend(self, q: Tensor, kv: KeyValue, mask: Tensor | None, causal: bool) -> Tensor:
        out = F.scaled_dot_product_attention(q, kv.key, kv.value, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def forward(
        self,
        x_BSD: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        past: KeyValue | None = None,
        start: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """Self-attention; `mask` is boolean, True where attention is allowed, `(S, C + S)`.

        With `start`, queries are the positions from there on alone, and so is the result; the mask then has their rows.
        """
        if start:
            (q,), (k, v) = self._project(x_BSD[:, start:], 0, 1), self._project(x_BSD, 1, 3)
        else:
            q, k, v = self._project(x_BSD, 0, 3)
        if past is not None:
            k, v = torch.cat([past.key, k], dim=2), torch.cat([past.value, v], dim=2)
        kv = KeyValue(k, v)
        return self._attend(q, kv, mask, causal), kv

    def project_context(self, context_BKD: Tensor) -> KeyValue:
        """Keys and values of a context, computed once for a whole generation."""
        return KeyValue(*self._project(context_BKD, 1, 3))

    def cross(self, x_BSD: Tensor, kv: KeyValue) -> Tensor:
        """Attention to a projected context."""
        return self._attend(self._project(x_BSD, 0, 1)[0], kv, None, False)


def _mlp(width: int, mlp_width: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            c_fc=nn.Linear(width, mlp_width),
            gelu=nn.GELU(approximate="tanh"),  # the encoder's is exact, the decoder's is not (docs/reference.md)
            c_proj=nn.Linear(mlp_width, width),
        )
    )


class SelfBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = _mlp(width, mlp_width)

    def forward(
        self,
        x_BSD: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        past: KeyValue | None = None,
        start: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """`start`: see Attention."""
        attended_BSD, kv = self.attn(self.ln_1(x_BSD), mask, causal=causal, past=past, start=start)
        x_BSD = x_BSD[:, start:] + attended_BSD
        return x_BSD + self.mlp(self.ln_2(x_BSD)), kv

    def project(self, x_BSD: Tensor) -> KeyValue:
        """Keys and values alone, of positions whose outputs nobody reads."""
        return self.attn.project_context(self.ln_1(x_BSD))


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
        return self.attn.project_context(self.ln_context(context_BKD))

    def forward(self, x_BSD: Tensor, context_BKD: Tensor | None = None, kv: KeyValue | None = None) -> Tensor:
        """Give the context `(B, K, D)`, or its projection from `project_context`."""
        if kv is None:
            assert context_BKD is not None
            kv = self.project_context(context_BKD)
        x_BSD = x_BSD + self.attn.cross(self.ln_1(x_BSD), kv)
        return x_BSD + self.mlp(self.ln_2(x_BSD))

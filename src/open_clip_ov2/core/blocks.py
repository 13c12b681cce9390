"""Transformer blocks of the text decoder, with a key-value cache for generation.

Shapes: B batch, S sequence, D width, H heads, C cached positions, K image tokens of an image (core/__init__.py); T
tokens of all rows together, I image tokens first, then t caption tokens (core/rows.py).
Parameter names are those of the released PyTorch caption decoders (docs/reference.md): `ln_1`, `attn.in_proj_*`,
`attn.out_proj`, `ln_2`, `mlp.c_fc`, `mlp.c_proj`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.compute import product_of
from open_clip_ov2.core.rows import KeyValue, Rows, attend, key_value

EPS = 1e-6  # flax's LayerNorm, as the reference uses it


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its weights, result in the dtype of its input (low-precision weights)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)


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


class _Block(nn.Module):
    """What both kinds of block share. Only what works token by token is compiled; attention depends on the rows."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        gelu = nn.GELU(approximate="tanh")  # the encoder's is exact, the decoder's is not (docs/reference.md)
        self.mlp: Any = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, mlp_width), gelu=gelu, c_proj=nn.Linear(mlp_width, width))
        )
        self.recompute_elementwise = False  # norms and the GELU, in the backward pass
        self._compiled: dict[str, Callable[..., Any]] = {}

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, after attention."""
        x, elementwise = x + self.attn.out_proj(attended), self.recompute_elementwise
        hidden = product_of(self.ln_2, self.mlp.c_fc, x, elementwise)
        return x + product_of(self.mlp.gelu, self.mlp.c_proj, hidden, elementwise)

    def _projection(self, norm: nn.Module, x: Tensor, first: int, stop: int) -> Tensor:
        return product_of(norm, lambda x: self.attn.project(x, first, stop), x, self.recompute_elementwise)

    def compile_tokenwise(self, **options: Any) -> None:
        """With torch.compile, for any number of tokens."""
        for name in ("before", "context", "after"):
            if function := getattr(type(self), name, None):
                self._compiled[name] = torch.compile(function, dynamic=True, **options)

    def _run(self, name: str, *arguments: Any) -> Any:
        """A function of this block, compiled or not."""
        return self._compiled.get(name, getattr(type(self), name))(self, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": {}}  # compiled code is neither copied nor pickled


class SelfBlock(_Block):
    """Pre-norm self-attention and MLP."""

    def before(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Queries of the tokens from `first` on, `(t, D)`, and keys and values of all, `(T, 2 D)`."""
        if not first:
            width = x.shape[-1]
            q, kv = self._projection(self.ln_1, x, 0, 3).split([width, 2 * width], dim=-1)
            return q, kv
        x = self.ln_1(x)
        return self.attn.project(x[first:], 0, 1), self.attn.project(x, 1, 3)

    def packed(self, x_TD: Tensor, rows: Rows, last: bool) -> Tensor:
        """`(T, D)` -> `(T, D)`; the `last` block gives the captions alone, `(t, D)`: nobody reads its image tokens.
        These see those of their row, caption tokens those and the caption before them."""
        first, heads = rows.num_image if last else 0, self.attn.heads
        q, kv_T2D = self._run("before", x_TD, first)
        images, captions = q.split([len(q) - rows.num_captions, rows.num_captions])
        attended, image_kv = rows.after_image(captions, kv_T2D, heads)
        if len(images):
            attended = torch.cat([rows.images(images, image_kv, heads), attended])
        return self._run("after", x_TD[first:] if first else x_TD, attended)

    def forward(
        self, x_BSD: Tensor, mask: Tensor | None = None, causal: bool = False, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """For generation: with the keys and values. `mask` boolean, True where attention is allowed, `(S, C + S)`."""
        q_BSD, kv_BS2D = self.before(x_BSD)
        kv = key_value(kv_BS2D, self.attn.heads)
        if past is not None:
            kv = KeyValue(torch.cat([past.key, kv.key], dim=2), torch.cat([past.value, kv.value], dim=2))
        return self.after(x_BSD, attend(q_BSD, kv, self.attn.heads, mask, causal)), kv

    def project(self, x_BSD: Tensor) -> KeyValue:
        """Keys and values alone, for positions whose outputs nobody reads."""
        return key_value(self.attn.project(self.ln_1(x_BSD), 1, 3), self.attn.heads)


class CrossBlock(_Block):
    """Pre-norm cross-attention to the image tokens and MLP (reference: text_decoder_v2.py, ln_x, ln_u, ln_mlp)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__(width, heads, mlp_width)
        self.ln_context = LayerNorm(width)

    def context(self, context: Tensor) -> Tensor:
        """Keys and values of the image tokens, `(..., D)` -> `(..., 2 D)`."""
        return self._projection(self.ln_context, context, 1, 3)

    def before(self, x: Tensor) -> Tensor:
        """Queries, `(..., D)`."""
        return self._projection(self.ln_1, x, 0, 1)

    def packed(self, x_tD: Tensor, context_ID: Tensor, rows: Rows) -> Tensor:
        """Captions `(t, D)`, image tokens `(I, D)` -> `(t, D)`."""
        q_tD, kv_I2D = self._run("before", x_tD), self._run("context", context_ID)
        return self._run("after", x_tD, rows.context(q_tD, kv_I2D, self.attn.heads))

    def forward(self, x_BSD: Tensor, mask: Tensor | None, past: KeyValue) -> tuple[Tensor, KeyValue]:
        """For generation; `past` from `project`, of which all is seen."""
        return self.after(x_BSD, attend(self.before(x_BSD), past, self.attn.heads)), past

    def project(self, context_BKD: Tensor) -> KeyValue:
        return key_value(self.context(context_BKD), self.attn.heads)

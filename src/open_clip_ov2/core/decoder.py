"""The text decoder over [image tokens ; caption tokens].

Shapes: B batch, K kept image tokens, L caption tokens, S = K + L, D decoder width, V vocabulary; of all rows together I
image tokens, t caption positions, T both (core/rows.py).
Source: docs/reference.md, "Model" (text_decoder_v2.py of the reference; OpenVision's prefix-LM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.blocks import CrossBlock, LayerNorm, SelfBlock
from open_clip_ov2.core.compute import recompute
from open_clip_ov2.core.rows import KeyValue, Parts, RaggedTokens, Rows, prefix_mask

Fusion = Literal["prefix", "causal", "cross_attn"]
FUSIONS: tuple[str, ...] = get_args(Fusion)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the text decoder. `width` in channels, `layers` counts self- and cross-attention blocks alike."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    fusion: Fusion = "prefix"

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}; it is one of {', '.join(FUSIONS)}")
        if self.width % self.heads:
            raise ValueError(f"decoder width {self.width} is not divisible by its {self.heads} heads")
        if self.fusion == "cross_attn" and self.layers % 2:
            raise ValueError(f"fusion cross_attn takes an even number of layers, got {self.layers}")


DecoderCache = list[KeyValue]  # what generation keeps between tokens, one for each block


class TextDecoder(nn.Module):
    """Image tokens and caption ids in, hidden states out; `lm_head` turns those into logits.

    No position embedding for text; attention is what orders it (`prefix`: image tokens see all image tokens,
    caption tokens the image and the captions before them; `causal`: lower triangle over the whole sequence;
    `cross_attn`: causal self-attention over text and cross-attention to the image, block by block in turn).
    """

    def __init__(self, config: DecoderConfig, image_width: int, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.image_projection: nn.Module = nn.Linear(image_width, config.width, bias=False)
        sizes = (config.width, config.heads, config.mlp_width)
        crosses = config.fusion == "cross_attn"
        self.blocks: Any = nn.ModuleList(
            CrossBlock(*sizes) if crosses and index % 2 else SelfBlock(*sizes) for index in range(config.layers)
        )
        self.ln_final = LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, vocab_size, bias=False)
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Standard deviations of the reference (text_decoder_v2.py); biases are zero, norms are one."""
        width, layers = self.config.width, self.config.layers
        if self.config.fusion == "cross_attn":
            layers //= 2  # the reference counts pairs there
        attn_std, fc_std, proj_std = width**-0.5, (2 * width) ** -0.5, width**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        projection = cast(nn.Linear, self.image_projection)
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        nn.init.normal_(self.lm_head.weight, std=width**-0.5)
        for block in self.blocks:
            attn, mlp = block.attn, block.mlp
            nn.init.normal_(attn.in_proj_weight, std=attn_std)
            for linear, std in ((attn.out_proj, proj_std), (mlp.c_fc, fc_std), (mlp.c_proj, proj_std)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def use_blocks(self, blocks: Sequence[SelfBlock]) -> None:
        """Blocks whose parameters belong to another module, which has them in its state dict, in place of its own;
        image tokens then enter as they are."""
        del self.blocks
        self.blocks, self.image_projection = tuple(blocks), nn.Identity()

    def forward(self, image_tokens_BKD: Tensor, ids_BL: Tensor) -> Tensor:
        """`(B, K, image width)`, `(B, L)` int64 -> hidden states of the caption positions `(B, L, D)`, normed."""
        shape = (ids_BL.shape[0], ids_BL.shape[1])
        return self.packed(image_tokens_BKD, ids_BL.flatten(), (shape,)).unflatten(0, shape)

    def packed(self, image_tokens: Tensor | RaggedTokens, ids_t: Tensor, parts: Parts) -> Tensor:
        """Captions side by side, see PackedCaptions: `(B, K, image width)`, or as many for each image as it has;
        `(t,)` int64 -> hidden states `(t, D)`, normed. Images are in the order of the groups."""
        if isinstance(image_tokens, Tensor):
            batch, kept, _ = image_tokens.shape
            image_tokens = RaggedTokens(image_tokens.flatten(0, 1), (kept,) * batch)
        image_ID = self.image_projection(image_tokens.tokens_ID)
        x, fusion = self._embed(ids_t, image_ID), self.config.fusion
        rows = Rows(image_tokens.counts, parts, image_ID, self.config.width // self.config.heads, fusion=fusion)
        if rows.num_image:
            x = torch.cat([image_ID, x])
        recomputes = self.grad_checkpointing and self.training
        for index, block in enumerate(self.blocks):
            if isinstance(block, CrossBlock):
                x = recompute(recomputes, block.packed, x, image_ID, rows)
            else:
                x = recompute(recomputes, block.packed, x, rows, index + 1 == len(self.blocks))
        return self.ln_final(x)

    def _embed(self, ids: Tensor, like: Tensor) -> Tensor:
        return self.token_embedding(ids).to(like.dtype)

    def image_cache(self, image_tokens_BKD: Tensor) -> DecoderCache:
        """Keys and values of the image, `(B, K, image width)`, which captions do not change."""
        x_BKD = image_BKD = self.image_projection(image_tokens_BKD)
        cache = []
        for block in self.blocks:
            if self.config.fusion == "cross_attn":  # text has the self-attention for itself
                kv = block.project(image_BKD if isinstance(block, CrossBlock) else image_BKD[:, :0])
            elif block is self.blocks[-1]:  # nobody reads the image's outputs
                kv = block.project(x_BKD)
            else:
                x_BKD, kv = block(x_BKD, causal=self.config.fusion == "causal")
            cache.append(kv)
        return cache

    def after_image(self, ids_T: Tensor, cache: DecoderCache, sees_TT: Tensor) -> Tensor:
        """Hidden states `(B, T, D)`, normed, of the tokens `(T,)` int64 after each image of the cache. `sees_TT`
        boolean: which of the tokens each one sees, beside the whole image."""
        like = cache[0].key
        return self._after(self._embed(ids_T, like).expand(len(like), -1, -1), cache, sees_TT)[0]

    def extend(self, ids_BT: Tensor, cache: DecoderCache) -> tuple[Tensor, DecoderCache]:
        """More tokens for each row, `(B, T)` int64 -> hidden state of the last one `(B, D)`, normed, and the new
        cache."""
        sees_TT = prefix_mask(0, ids_BT.shape[1], ids_BT.device) if ids_BT.shape[1] > 1 else None
        hidden_BTD, extended = self._after(self._embed(ids_BT, self.lm_head.weight), cache, sees_TT)
        return hidden_BTD[:, -1], extended

    def _after(self, x_BTD: Tensor, cache: DecoderCache, sees_TT: Tensor | None) -> tuple[Tensor, DecoderCache]:
        """`(B, T, D)` -> the same, normed: tokens that see all of the cache, and of themselves what `sees_TT` says; and
        the keys and values of both."""
        extended = []
        for block, entry in zip(self.blocks, cache, strict=True):
            mask_TS = None if sees_TT is None else F.pad(sees_TT, (entry.key.shape[2], 0), value=True)
            x_BTD, kv = block(x_BTD, mask_TS, past=entry)
            extended.append(kv)
        return self.ln_final(x_BTD), extended

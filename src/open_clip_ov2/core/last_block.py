"""An encoder's last block for the kept tokens alone: nobody reads its other outputs.

Shapes: B batch, N image tokens, K kept image tokens, D width (core/__init__.py). Keys and values are those of all
tokens, so the kept tokens come out as they would otherwise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from open_clip_ov2.core.budget import called
from open_clip_ov2.core.tokens import TokenDrop, gather_tokens


def kept_tokens(visual: Any, images: Tensor, token_drop: TokenDrop, last_block: Any, **drop: Any) -> Tensor:
    """`(B, 3, H, W)` -> `(B, K, D)`: what `token_drop` keeps of the patch tokens after the last block.

    `visual` is OpenCLIP's VisionTransformer; `last_block` is `block_at`, or that compiled. `drop`: TokenDrop's options.
    """
    blocks = visual.transformer.resblocks
    again = visual.transformer.grad_checkpointing and visual.training
    x_BSD = visual._embeds(images)  # [class token ; N patch tokens]
    for block in blocks[:-1]:
        x_BSD = called(block, x_BSD, again=again)
    batch, sequence, _ = x_BSD.shape
    kept_idx_BK = token_drop.draw(batch, sequence - 1, x_BSD.device, **drop)
    if kept_idx_BK is None:
        return called(blocks[-1], x_BSD, again=again)[:, 1:]
    return called(last_block, blocks[-1], x_BSD, kept_idx_BK + 1, again=again)


def block_at(block: Any, x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """OpenCLIP's ResidualAttentionBlock at some of its positions, `(B, S, D)`, `(B, K)` int64 -> `(B, K, D)`."""
    x_BKD = gather_tokens(x_BSD, index_BK)
    all_BSD = block.ln_1(x_BSD)
    x_BKD = x_BKD + block.ls_1(block.attention(gather_tokens(all_BSD, index_BK), all_BSD, all_BSD))
    return x_BKD + block.ls_2(block.mlp(block.ln_2(x_BKD)))

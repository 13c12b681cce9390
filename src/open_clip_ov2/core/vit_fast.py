"""All that looks inside OpenCLIP's VisionTransformer: faster code for parts of it, and the outputs of single layers.

Parameters and their names stay as they are. `check_tower` says which attributes all of this needs; the encoder itself,
written out, is `encode` in core/reference.py. Measured: scripts/kernel_bench.py.

Shapes: B batch, S tokens, N patches, K kept patches, D width, H heads (core/__init__.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.attention import scaled_dot_product
from open_clip_ov2.core.compute import product_of, recompute
from open_clip_ov2.core.tokens import TokenDrop, gather_tokens

# Attributes that are used of the tower, of its transformer and of each block; those of open_clip_torch 3.3.0.
TOWER = (
    "_embeds", "conv1", "class_embedding", "positional_embedding", "grid_size", "transformer", "ln_post", "proj",
    "forward_intermediates", "set_grad_checkpointing", "lock",
)  # fmt: skip
TRANSFORMER = ("resblocks", "grad_checkpointing")
BLOCK = ("ln_1", "attn", "ls_1", "attention", "ln_2", "mlp", "ls_2")
# For openclip/patches.py: (what has it, its private name or "__class__" where its class is changed, why).
PRIVATE_NAMES = (
    (
        "open_clip.transformer.VisionTransformer",
        "_embeds",
        "tokens before the first block, so that the last block can run for the kept tokens alone",
    ),
    ("torch.nn.Conv2d", "__class__", "a patch embedding becomes LinearPatches: one matrix product"),
    ("torch.nn.MultiheadAttention", "__class__", "attention of a block becomes SelfAttention: no copies of its inputs"),
)


def check_tower(visual: nn.Module) -> None:
    """Raises ImportError, in one line, for an encoder that lacks any of the attributes that are used here."""
    transformer: Any = getattr(visual, "transformer", None)
    blocks = list(getattr(transformer, "resblocks", []))[:1]
    missing = [name for name in TOWER if not hasattr(visual, name)]
    missing += [f"transformer.{name}" for name in TRANSFORMER if not hasattr(transformer, name)]
    missing += [f"transformer.resblocks.0.{name}" for block in blocks for name in BLOCK if not hasattr(block, name)]
    if missing:
        raise ImportError(
            f"this vision encoder has no {', '.join(missing)}; ov2 models need OpenCLIP's VisionTransformer with its "
            "default blocks, checked with open_clip_torch 3.3.0: pip install 'open_clip_torch[training]==3.3.*'"
        )


def use_fast_parts(visual: nn.Module) -> None:
    """In place; parts of another class than expected stay as they are. Raises ImportError, see `check_tower`."""
    check_tower(visual)
    tower: Any = visual
    if type(tower.conv1) is nn.Conv2d:
        tower.conv1.__class__ = LinearPatches
    for block in tower.transformer.resblocks:
        if type(block.attn) is nn.MultiheadAttention and block.attn.batch_first:
            block.attn.__class__ = SelfAttention


@contextlib.contextmanager
def stock_patches(visual: nn.Module) -> Iterator[None]:
    """The patch embedding as a convolution for a while, for exporters that recognize it by its operator."""
    conv1: Any = visual.conv1
    kind = type(conv1)
    conv1.__class__ = nn.Conv2d if kind is LinearPatches else kind
    try:
        yield
    finally:
        conv1.__class__ = kind


def embedded(visual: Any, images: Tensor) -> Tensor:
    """What the first block gets, `(B, 3, H, W)` -> `(B, 1 + N, D)`: class token and patches, with their positions."""
    return visual._embeds(images)


def kept_tokens(visual: Any, images: Tensor, token_drop: TokenDrop, through_blocks: Any, **drop: Any) -> Tensor:
    """`(B, 3, H, W)` -> `(B, K, D)`: what `token_drop` keeps of the patch tokens after the last block.
    `through_blocks`: the function of this name, with or without `last_block`, or that compiled."""
    x_BSD = embedded(visual, images)
    kept_idx_BK = token_drop(len(x_BSD), x_BSD.shape[1] - 1, x_BSD.device, **drop)
    return through_blocks(visual, x_BSD, kept_idx_BK)


def through_blocks(visual: Any, x_BSD: Tensor, kept_idx_BK: Tensor | None, last_block: Any = None) -> Tensor:
    """`(B, 1 + N, D)` -> `(B, K, D)`: the kept patch tokens, or all, after the last block, which is computed for these
    alone. `last_block` is `block_at`, or that compiled."""
    blocks = visual.transformer.resblocks
    recomputes = visual.transformer.grad_checkpointing and visual.training
    for block in blocks[:-1]:
        x_BSD = recompute(recomputes, block, x_BSD)
    if kept_idx_BK is None:
        return recompute(recomputes, blocks[-1], x_BSD)[:, 1:]
    return recompute(recomputes, last_block or block_at, blocks[-1], x_BSD, kept_idx_BK + 1)


def block_at(block: Any, x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """A block's outputs at some positions, `(B, S, D)`, `(B, K)` int64 -> `(B, K, D)`; keys and values are of all."""
    all_BSD = block.ln_1(x_BSD)
    attended_BKD = block.attention(gather_tokens(all_BSD, index_BK), all_BSD, all_BSD)
    return after_attention(block, gather_tokens(x_BSD, index_BK), attended_BKD)


def recompute_elementwise(visual: Any) -> None:
    """In place: of the norms and the GELU of a block, the inputs alone are kept for the backward pass."""
    for block in visual.transformer.resblocks:
        block.recompute_elementwise = True
        block.forward = functools.partial(_keeping_inputs, block)


def _keeping_inputs(block: Any, x_BSD: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is None and getattr(block.attn, "is_fused", False):
        attended_BSD = _of_projections(block.attn, normed_projections(block, x_BSD))
    else:  # with adapters
        attended_BSD = block.attention(block.ln_1(x_BSD), attn_mask=attn_mask)
    return after_attention(block, x_BSD, attended_BSD)


def normed_projections(block: Any, x: Tensor) -> Tensor:
    """Queries, keys and values side by side, `(..., D)` -> `(..., 3 D)`."""
    return product_of(block.ln_1, functools.partial(projections, block.attn), x, _recomputes(block))


def after_attention(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block, `(..., D)` -> the same."""
    x, mlp = x + block.ls_1(attended), block.mlp
    hidden = product_of(block.ln_2, mlp.c_fc, x, _recomputes(block))
    return x + block.ls_2(product_of(mlp.gelu, mlp.c_proj, hidden, _recomputes(block)))


def _recomputes(block: Any) -> bool:
    return getattr(block, "recompute_elementwise", False)


def image_features(
    visual: Any, images: Tensor, *, layer: int = -1, norm: bool = False, class_token: bool = False
) -> Tensor:
    """Tokens after block `layer` of an OpenCLIP VisionTransformer, `(B, 3, H, W)` -> `(B, N, D)`.

    `layer` counts blocks from 0, or from the end: -1 is the last block, what the caption loss trains and the decoder
    gets; -2 the penultimate one, which LLaVA takes from CLIP. `norm` applies the encoder's final norm. `class_token`
    puts the class token in front, `(B, 1 + N, D)`. Raises ValueError for a layer that is not there.
    """
    blocks = len(visual.transformer.resblocks)
    if not -blocks <= layer < blocks:
        raise ValueError(f"layer {layer}: this encoder has {blocks} blocks, 0 to {blocks - 1}, or -{blocks} to -1")
    out = visual.forward_intermediates(
        images,
        indices=[layer % blocks],
        stop_early=True,
        normalize_intermediates=norm,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=class_token,
    )
    tokens_BND = out["image_intermediates"][0]
    return torch.cat([out["image_intermediates_prefix"][0], tokens_BND], dim=1) if class_token else tokens_BND


class LinearPatches(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product: two to four times as fast."""

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, height, width)` -> `(B, D, rows, columns)`, in memory as `(B, N, D)`."""
        high, wide = cast(tuple[int, int], self.kernel_size)
        apart = self.stride == self.kernel_size and self.groups == 1
        if not apart or any(self.padding) or self.dilation != (1, 1):
            return super().forward(images)
        rows, columns = images.shape[2] // high, images.shape[3] // wide
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))  # before the copy, which is then smaller
        whole = images[:, :, : rows * high, : columns * wide]
        patches = whole.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        out_BND = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        return out_BND.transpose(1, 2).unflatten(2, (rows, columns))


def projections(attention: Any, x: Tensor) -> Tensor:
    """Queries, keys and values side by side, `(..., D)` -> `(..., 3 D)`."""
    layer = getattr(attention, "projects_by", None)
    return layer(x) if layer else F.linear(x, attention.in_proj_weight, attention.in_proj_bias)


def project_by(attention: Any, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Project by what `kind` makes of a linear layer with the same parameters. It becomes no submodule, so the state
    dict stays as it is."""
    rows, columns = attention.in_proj_weight.shape
    linear = nn.Linear(columns, rows, device="meta")
    linear.weight, linear.bias = attention.in_proj_weight, attention.in_proj_bias
    attention.__dict__["projects_by"] = kind(linear)


def _of_projections(attention: Any, *parts: Tensor) -> Tensor:
    """Queries, keys and values, or all side by side, -> `(B, S, D)`."""
    parts = parts[0].chunk(3, dim=-1) if len(parts) == 1 else parts
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
    return attention.out_proj(scaled_dot_product(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(nn.MultiheadAttention):
    """torch's own copies queries, keys and values to another order and back; fused kernels read them where they are."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(B, S, D)` queries, keys and values of the same `(B, S', D)` -> `(B, S, D)`, None."""
        given = {name for name, option in kwargs.items() if option is not None}
        if args or given != {"need_weights"} or kwargs["need_weights"] or key is not value or not self.is_fused:
            return super().forward(query, key, value, *args, **kwargs)
        if query is key:  # one product
            return _of_projections(self, projections(self, query)), None
        weight, bias, width = self.in_proj_weight, cast(Tensor, self.in_proj_bias), query.shape[-1]
        kv = F.linear(key, weight[width:], bias[width:])
        return _of_projections(self, F.linear(query, weight[:width], bias[:width]), *kv.chunk(2, dim=-1)), None

    @property
    def is_fused(self) -> bool:
        return self.in_proj_bias is not None and self.bias_k is None and not self.add_zero_attn and self.dropout == 0.0

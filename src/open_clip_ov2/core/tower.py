"""Faster code for two parts of OpenCLIP's VisionTransformer, over the same parameters under the same names.

Shapes: B batch, S tokens, N patches, D width, H heads (core/__init__.py). Measured: scripts/kernel_bench.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.attention import scaled_dot_product


def use_fast_parts(visual: nn.Module) -> None:
    """In place. Parts of another kind than expected stay as they are."""
    tower: Any = visual
    if type(tower.conv1) is nn.Conv2d:
        tower.conv1.__class__ = LinearPatches
    for block in tower.transformer.resblocks:
        if type(block.attn) is nn.MultiheadAttention and block.attn.batch_first:
            block.attn.__class__ = SelfAttention


@contextlib.contextmanager
def stock_patches(visual: nn.Module) -> Iterator[None]:
    """The patch embedding as the convolution that it is, for exporters that tell one by its operator."""
    conv1: Any = visual.conv1
    kind = type(conv1)
    conv1.__class__ = nn.Conv2d if kind is LinearPatches else kind
    try:
        yield
    finally:
        conv1.__class__ = kind


class LinearPatches(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product: two to four times as fast."""

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, height, width)` -> `(B, D, rows, columns)`, in memory as `(B, N, D)`."""
        high, wide = cast(tuple[int, int], self.kernel_size)
        if (
            self.stride != self.kernel_size
            or self.groups != 1
            or any(self.padding)
            or any(d != 1 for d in self.dilation)
        ):
            return super().forward(images)
        rows, columns = images.shape[2] // high, images.shape[3] // wide
        if torch.is_autocast_enabled(images.device.type):
            images = images.to(torch.get_autocast_dtype(images.device.type))  # before the copy, which is then smaller
        whole = images[:, :, : rows * high, : columns * wide]
        patches = whole.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        out_BND = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        return out_BND.transpose(1, 2).unflatten(2, (rows, columns))


class SelfAttention(nn.MultiheadAttention):
    """torch's own copies queries, keys and values to another order and back; fused kernels read them where they are."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`(B, S, D)` queries, keys and values of the same `(B, S', D)` -> `(B, S, D)`, None."""
        given = {name for name, option in kwargs.items() if option is not None}
        if args or given != {"need_weights"} or kwargs["need_weights"] or key is not value or not self._plain:
            return super().forward(query, key, value, *args, **kwargs)
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key:
            parts = F.linear(query, weight, bias).chunk(3, dim=-1)
        else:
            kv = F.linear(key, weight[width:], bias[width:]).chunk(2, dim=-1)
            parts = (F.linear(query, weight[:width], bias[:width]), *kv)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        out_BHSd = scaled_dot_product(q, k, v)
        return self.out_proj(out_BHSd.transpose(1, 2).flatten(2)), None

    @property
    def _plain(self) -> bool:
        return self.in_proj_bias is not None and self.bias_k is None and not self.add_zero_attn and self.dropout == 0.0

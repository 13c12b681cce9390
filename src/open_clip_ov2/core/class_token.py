"""Self-attention with the class token apart, so that the patches alone fill a GPU kernel's tiles.

Shapes: B batch, N patches, S = 1 + N tokens, H heads, d head width (core/__init__.py). At 224 px and 14 px patches S is
257: kernels work on tiles of 128 tokens, so the one class token costs a third row and column of tiles. Here patches
attend to patches in the kernel, and the class token's row and column are added in plain operators, which torch.compile
fuses. Merging two softmaxes by their log partition functions is exact (FlashAttention, arXiv 2205.14135, section 3.1;
the kernel's backward pass takes the merged output and log partition function, as in Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128  # tokens; of FlashAttention-2's and cuDNN's kernels for heads of 64 on Hopper


def pays(qkv_BS3D: Tensor) -> bool:
    """Where a tile is saved: half precision on a GPU, patches in whole tiles, and the rest compiled."""
    half = qkv_BS3D.dtype in (torch.float16, torch.bfloat16)
    there = torch.compiler.is_compiling() and qkv_BS3D.is_cuda and half and qkv_BS3D.shape[1] % TILE == 1
    return there and _has_kernel()


@torch.compiler.assume_constant_result
def _has_kernel() -> bool:
    """cuDNN's, of which this was measured: Hopper and later."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)


def class_token_attention(qkv_BS3D: Tensor, heads: int) -> Tensor:
    """Queries, keys and values beside each other, class token first -> what attention gives, `(B, S, D)`."""
    return _ClassTokenAttention.apply(qkv_BS3D, heads)


def _heads(qkv_BS3D: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each `(B, H, S, d)`."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv_BS3D.chunk(3, dim=-1))
    return q, k, v


class _ClassTokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BS3D: Tensor, heads: int) -> Tensor:
        q, k, v = _heads(qkv_BS3D, heads)
        scale = q.shape[-1] ** -0.5
        patches_BHNd, lse_BHN, extra = _kernel(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
        score_BHN = (q[:, :, 1:].float() * k[:, :, :1].float()).sum(-1) * scale  # patches' queries, class token's key
        merged_BHN = torch.logaddexp(lse_BHN, score_BHN)
        share_BHN1 = (score_BHN - merged_BHN).exp()[..., None]
        seen_BHNd = patches_BHNd.float() * (1 - share_BHN1) + v[:, :, :1].float() * share_BHN1
        weights_BHS1 = _class_weights(q, k, scale)
        class_BH1d = (weights_BHS1 * v.float()).sum(2, keepdim=True)
        out_BHSd = torch.cat([class_BH1d, seen_BHNd], dim=2).to(q.dtype)
        out_BSHd = out_BHSd.transpose(1, 2).contiguous()
        ctx.save_for_backward(qkv_BS3D, out_BSHd, merged_BHN, *extra)
        ctx.heads = heads
        return out_BSHd.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BSD: Tensor) -> tuple[Tensor, None]:
        qkv_BS3D, out_BSHd, merged_BHN, *extra = ctx.saved_tensors
        q, k, v = _heads(qkv_BS3D, ctx.heads)
        scale = q.shape[-1] ** -0.5
        d_out = d_out_BSD.unflatten(-1, (ctx.heads, -1)).transpose(1, 2)
        out = out_BSHd.transpose(1, 2)
        d_q, d_k, d_v = _kernel_backward(
            d_out[:, :, 1:], q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], out[:, :, 1:], merged_BHN, extra
        )
        d_seen, own_q = d_out[:, :, 1:].float(), q[:, :, 1:].float()
        # The class token's key and value, for the patches' queries.
        share_BHN = ((own_q * k[:, :, :1].float()).sum(-1) * scale - merged_BHN).exp()
        along_BHN = (d_seen * (v[:, :, :1].float() - out[:, :, 1:].float())).sum(-1)
        d_score_BHN1 = (share_BHN * along_BHN * scale)[..., None]
        d_class_k = (d_score_BHN1 * own_q).sum(2, keepdim=True)
        d_class_v = (share_BHN[..., None] * d_seen).sum(2, keepdim=True)
        # The class token's query, for all keys and values.
        weights_BHS1 = _class_weights(q, k, scale)
        d_class = d_out[:, :, :1].float()
        d_weights_BHS1 = (d_class * (v.float() - out[:, :, :1].float())).sum(-1, keepdim=True)
        d_scores_BHS1 = weights_BHS1 * d_weights_BHS1 * scale
        class_q = q[:, :, :1].float()
        parts = (
            torch.cat([(d_scores_BHS1 * k.float()).sum(2, keepdim=True), d_q + d_score_BHN1 * k[:, :, :1].float()], 2),
            torch.cat([d_class_k, d_k.float()], 2) + d_scores_BHS1 * class_q,
            torch.cat([d_class_v, d_v.float()], 2) + weights_BHS1 * d_class,
        )
        d_qkv = torch.cat([part.to(q.dtype).transpose(1, 2).flatten(2) for part in parts], dim=-1)
        return d_qkv, None


def _class_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax of the class token's scores over all keys, `(B, H, S, 1)` float32."""
    return ((q[:, :, :1].float() * k.float()).sum(-1, keepdim=True) * scale).softmax(dim=2)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention, its log partition functions `(B, H, N)`, and what the backward kernel wants beside them."""
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse, []
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.flatten(2), [seed, offset]


def _kernel_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_BHN: Tensor, extra: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse_BHN, 0.0, False
        )
    length = q.shape[2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse_BHN[..., None], *extra, None, None, None, length, length, 0.0, False
    )

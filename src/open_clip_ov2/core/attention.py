"""torch's scaled dot-product attention, with the kernel that was measured fastest (scripts/kernel_bench.py).

Shapes: B batch, H heads, S queries, C keys, d width of a head (core/__init__.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 64  # tokens up to which the memory-efficient kernel is ahead of FlashAttention and cuDNN on an H100


def scaled_dot_product(q_BHSd: Tensor, k_BHCd: Tensor, v_BHCd: Tensor, *, causal: bool = False) -> Tensor:
    """`(B, H, S, d)`; queries see all keys, or with `causal`, where S = C, those up to their own."""
    if q_BHSd.shape[2] <= SHORT and k_BHCd.shape[2] <= SHORT and _on_a_gpu_in_half(q_BHSd):
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHSd, k_BHCd, v_BHCd, None, torch.is_grad_enabled(), 0.0, causal
        )
        return out
    return F.scaled_dot_product_attention(q_BHSd, k_BHCd, v_BHCd, is_causal=causal)


def _on_a_gpu_in_half(x: Tensor) -> bool:
    """NVIDIA's; heads that its kernels take without padding."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and torch.version.cuda is not None and half and x.shape[-1] % 8 == 0

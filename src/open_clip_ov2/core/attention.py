"""torch's scaled dot-product attention by the kernel that was measured fastest (scripts/kernel_bench.py).

Shapes: B batch, H heads, S queries, C keys, d width of a head (core/__init__.py).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_STEP, HEAD_MOST = 8, 256  # widths of a head that these kernels take without padding
KERNELS = ("_flash_attention_forward", "_scaled_dot_product_efficient_attention")
SHORT = 64  # tokens up to which the memory-efficient kernel is ahead of FlashAttention and cuDNN on an H100


def scaled_dot_product(q_BHSd: Tensor, k_BHCd: Tensor, v_BHCd: Tensor, *, causal: bool = False) -> Tensor:
    """`(B, H, S, d)`. Queries see all keys; with `causal` (S = C) those up to their own position."""
    short = q_BHSd.shape[2] <= SHORT and k_BHCd.shape[2] <= SHORT
    if short and takes_half_kernels(q_BHSd, q_BHSd.shape[-1]):
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHSd, k_BHCd, v_BHCd, None, torch.is_grad_enabled(), 0.0, causal
        )
        return out
    return F.scaled_dot_product_attention(q_BHSd, k_BHCd, v_BHCd, is_causal=causal)


def use_flash_attention(version: str) -> None:
    """Let another FlashAttention, "FA3" or "FA4", take the place of torch's FlashAttention-2 in this process, and of
    cuDNN's attention, which torch would prefer. Raises ValueError in one line if it cannot."""
    try:
        from torch.nn.attention import activate_flash_attention_impl as activate
    except ImportError:
        raise ValueError(f"torch {torch.__version__} cannot exchange its FlashAttention; 2.14 can") from None
    try:
        activate(version)
    except Exception as error:  # which ones is not documented; most often the package with the kernels is missing
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"torch cannot use {version} here: {why}") from None
    torch.backends.cuda.enable_cudnn_sdp(False)


def takes_half_kernels(x: Tensor, head_width: int) -> bool:
    """Whether FlashAttention-2 and the memory-efficient kernel take this tensor."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and head_width % HEAD_STEP == 0 and head_width <= HEAD_MOST and has_half_kernels(x.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has not annotated it
def has_half_kernels(device: torch.device) -> bool:
    """True for NVIDIA GPUs from Ampere on, in a build with these kernels. torch.compile takes it for a constant."""
    return _has_half_kernels(device)


@functools.cache
def _has_half_kernels(device: torch.device) -> bool:
    """Raises ImportError if the kernels have no longer the names by which they are called here and in core/rows.py."""
    found = (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )
    missing = [name for name in KERNELS if found and not hasattr(torch.ops.aten, name)]
    if missing:
        raise ImportError(f"torch.ops.aten has no {', '.join(missing)}; checked with torch 2.11 to 2.14")
    return found

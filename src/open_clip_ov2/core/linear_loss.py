"""Cross entropy of a linear head without its logits: rows in chunks, gradients taken in the forward pass.

Shapes: R rows (real targets), c rows of one chunk, D width, V vocabulary.
Source: docs/performance.md, "Loss". The gradient of a row's objective by its logits is
`p (1 + 2 z lse) - (1 - s) onehot - s / V`, with p the softmax, lse the log partition function, s the label smoothing
and z the weight of the z-loss (PaLM, arXiv 2204.02311, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits that exist at once; measured, scripts/kernel_bench.py. Compiled, none of them exists in float32.
CPU_ROWS, GPU_ROWS, GPU_COMPILED_ROWS = 256, 4096, 8192


def softmax_rows(
    logits_cV: Tensor, labels_c: Tensor, sums: Tensor, smoothing: float, z_loss: float, wants_gradient: bool
) -> Tensor:
    """Adds the rows' nll and objective to `sums`; returns the objective's gradient by the logits, in their dtype.
    Overwrites float32 logits. Written out because torch's softmax on a CPU takes about four times as long
    (scripts/kernel_bench.py)."""
    labels_c1 = labels_c[:, None]
    mean_c1 = logits_cV.mean(dim=1, keepdim=True, dtype=torch.float32) if smoothing else None
    largest_c1 = logits_cV.amax(dim=1, keepdim=True).float()
    label_logit_c1 = logits_cV.gather(1, labels_c1).float() - largest_c1
    exp_cV = logits_cV.float().sub_(largest_c1).exp_()
    sum_c1 = exp_cV.sum(dim=1, keepdim=True)
    log_sum_c1 = sum_c1.log()
    lse_c1 = log_sum_c1 + largest_c1
    nll_c1 = log_sum_c1 - label_logit_c1  # not by lse: nothing large cancels
    objective_c1 = nll_c1
    if mean_c1 is not None:
        objective_c1 = (1 - smoothing) * nll_c1 + smoothing * (lse_c1 - mean_c1)
    if z_loss:
        objective_c1 = objective_c1 + z_loss * lse_c1.square()
    sums += torch.stack([nll_c1.sum(), objective_c1.sum()])
    if not wants_gradient:
        return logits_cV
    factor_c1 = (1 + 2 * z_loss * lse_c1) / sum_c1
    everywhere = smoothing / logits_cV.shape[1]
    d_logits_cV = exp_cV.mul_(factor_c1)
    if smoothing:
        d_logits_cV = d_logits_cV.sub_(everywhere)
    at_label_c1 = label_logit_c1.exp() * factor_c1 - everywhere - (1 - smoothing)  # rounded once, as all others
    return d_logits_cV.to(logits_cV.dtype).scatter_(1, labels_c1, at_label_c1.to(logits_cV.dtype))


def linear_cross_entropy(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softmax: Callable[..., Tensor] = softmax_rows,
) -> tuple[Tensor, Tensor]:
    """(nll, objective), float32 scalars: sums over the rows of `-log p(label)`, and of that with label smoothing and
    z-loss. Only the objective has a gradient, by `hidden_RD` and `weight_VD`.

    Under autocast the products are in its dtype, otherwise in that of `hidden_RD`; softmax, sums and the weight's
    gradient are in float32. `labels_R` int64, each a real target. `softmax`: `softmax_rows`, or that compiled.
    """
    device = hidden_RD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_RD.dtype
    gpu_rows = GPU_ROWS if softmax is softmax_rows else GPU_COMPILED_ROWS
    rows = CPU_ROWS if device == "cpu" else gpu_rows
    return _LinearCrossEntropy.apply(hidden_RD, weight_VD, labels_R, dtype, label_smoothing, z_loss, rows, softmax)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        dtype: torch.dtype,
        smoothing: float,
        z_loss: float,
        rows: int,
        softmax: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_RD.device.type, enabled=False):
            head = weight_VD.to(dtype)
            sums = torch.zeros(2, dtype=torch.float32, device=hidden_RD.device)
            wants_hidden, wants_weight = ctx.needs_input_grad[:2]
            d_hidden_RD = torch.empty_like(hidden_RD) if wants_hidden else None
            d_weight_VD = None
            for start in range(0, len(hidden_RD), rows):
                part = slice(start, start + rows)
                hidden_cD = hidden_RD[part].to(dtype)
                logits_cV = hidden_cD @ head.T
                d_logits_cV = softmax(logits_cV, labels_R[part], sums, smoothing, z_loss, wants_hidden or wants_weight)
                if d_hidden_RD is not None:
                    d_hidden_RD[part] = d_logits_cV @ head
                if wants_weight:
                    d_weight_VD = _with_product(d_weight_VD, d_logits_cV, hidden_cD)
            if wants_weight and d_weight_VD is None:  # no rows
                d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(d_hidden_RD, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        nll, objective = sums.unbind()
        ctx.mark_non_differentiable(nll)
        return nll, objective

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, scale: Tensor) -> tuple[Any, ...]:
        d_hidden_RD, d_weight_VD = ctx.saved_tensors
        d_hidden_RD = d_hidden_RD * scale.to(d_hidden_RD.dtype) if d_hidden_RD is not None else None
        d_weight_VD = (d_weight_VD * scale).to(ctx.weight_dtype) if d_weight_VD is not None else None
        return d_hidden_RD, d_weight_VD, None, None, None, None, None, None


def _with_product(sum_VD: Tensor | None, d_logits_cV: Tensor, hidden_cD: Tensor) -> Tensor:
    """`sum_VD + d_logits^T hidden` in float32, into `sum_VD` where there is one."""
    if sum_VD is None:
        return (d_logits_cV.T @ hidden_cD).float()
    if d_logits_cV.dtype == torch.float32:
        return sum_VD.addmm_(d_logits_cV.T, hidden_cD)
    return sum_VD.add_(d_logits_cV.T @ hidden_cD)

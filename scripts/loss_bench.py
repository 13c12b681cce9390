"""Kernels behind caption loss and attention against torch's own: milliseconds and ratios of interleaved repetitions.

    python scripts/loss_bench.py [--threads 2] [--repetitions 9]

Loss: 1,024 targets of width 256 over 32,000 words, forward and backward. Attention: forward and backward of one layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_clip_ov2.core.linear_loss import linear_cross_entropy

TARGETS, WIDTH, VOCABULARY = 1024, 256, 32_000
SHAPES = [(16, 6, 65, 64), (8, 6, 257, 64), (4, 6, 577, 64)]  # (batch, heads, tokens, width of a head)


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def our_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels)[1]


def torch_linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def interleaved(arms: dict[str, Callable[[], Tensor]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of forward and backward of each arm, in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repetitions + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm().backward()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(f"{title:34} {name:24} {statistics.median(values) * 1e3:8.1f} ms   {ratio:5.2f} x")


def bench_loss(dtype: torch.dtype, repetitions: int) -> None:
    hidden = torch.randn(TARGETS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TARGETS,))
    losses = {"F.cross_entropy of logits": plain_loss, "linear_cross_entropy": our_loss}
    if hasattr(F, "linear_cross_entropy"):  # torch's own, from 2.12 on
        losses["F.linear_cross_entropy"] = torch_linear_loss
    arms = {name: partial(loss, hidden, weight, labels) for name, loss in losses.items()}
    show(f"loss, {dtype}", interleaved(arms, repetitions))


def bench_attention(dtype: torch.dtype, shape: tuple[int, ...], repetitions: int) -> None:
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).sum()

    backends = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
    arms = {name: partial(attend, backend) for name, backend in backends.items()}
    show(f"attention {shape}, {dtype}", interleaved(arms, repetitions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads; medians, ratios to the first of each group")
    for dtype in (torch.float32, torch.bfloat16):
        bench_loss(dtype, args.repetitions)
        for shape in SHAPES:
            bench_attention(dtype, shape, args.repetitions)


if __name__ == "__main__":
    main()

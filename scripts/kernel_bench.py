"""Kernels behind caption loss, attention and patch embedding against others: interleaved repetitions of forward and
backward, medians, and ratios to the first of each group.

    python scripts/kernel_bench.py [--threads 2] [--repetitions 9]         # CPU: the small setting's sizes
    python scripts/kernel_bench.py --device cuda                           # GPU: sizes of ov2-vit-l-14, bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from open_clip_ov2.core import CaptionLoss, linear_loss
from open_clip_ov2.core.linear_loss import linear_cross_entropy, softmax_rows
from open_clip_ov2.core.rows import prefix_mask

# (targets, width, words); (batch, heads, tokens, width of a head).
CPU_LOSS, GPU_LOSS = (1024, 256, 32_000), (16_384, 768, 32_000)
CPU_SHAPES = [(16, 6, 65, 64), (8, 6, 257, 64), (4, 6, 577, 64)]
GPU_SHAPES = [(256, 16, 257, 64), (256, 16, 256, 64), (512, 16, 37, 64), (64, 16, 577, 64)]
CAPTIONS = [(32, 12, 64, 89, 64), (64, 12, 64, 12, 64)]  # (rows, heads, caption tokens, image tokens, width of a head)

Variants = dict[str, Callable[[], Tensor]]


class Bench:
    def __init__(self, device: str, repetitions: int) -> None:
        self.device, self.repetitions = torch.device(device), repetitions

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(std).requires_grad_()

    def show(self, title: str, variants: Variants) -> None:
        """Of each variant, in turns; the first turn is not counted. What cannot run here says so."""
        seconds: dict[str, list[float]] = {}
        for name, variant in variants.items():
            try:
                self._time(variant)
                seconds[name] = []
            except Exception as error:  # a kernel that is not there for this device or shape
                print(f"{title:40} {name:34} {type(error).__name__}: {str(error).splitlines()[0][:60]}")
        for _ in range(self.repetitions):
            for name in seconds:
                seconds[name].append(self._time(variants[name]))
        first = next(iter(seconds.values()), [])
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
            print(f"{title:40} {name:34} {statistics.median(values) * 1e3:9.3f} ms   {ratio:5.2f} x", flush=True)

    def _time(self, variant: Callable[[], Tensor]) -> float:
        self._wait()
        start = time.perf_counter()
        variant().backward()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # --- the groups --------------------------------------------------------------------------------

    def loss(self, dtype: torch.dtype) -> None:
        rows, width, words = CPU_LOSS if self.device.type == "cpu" else GPU_LOSS
        # As a head starts: with larger logits most probabilities are denormal, and ten times as slow on some CPUs.
        hidden, weight = self.random(rows, width, dtype=dtype), self.random(words, width, dtype=dtype, std=width**-0.5)
        labels = torch.randint(0, words, (rows,), device=self.device)

        def ours(chunk: int, softmax: Callable[..., Tensor] = softmax_rows) -> Tensor:
            before = linear_loss.CPU_ROWS, linear_loss.GPU_ROWS, linear_loss.GPU_COMPILED_ROWS
            linear_loss.CPU_ROWS = linear_loss.GPU_ROWS = linear_loss.GPU_COMPILED_ROWS = chunk
            try:
                return linear_cross_entropy(hidden, weight, labels, softmax=softmax)[1]
            finally:
                linear_loss.CPU_ROWS, linear_loss.GPU_ROWS, linear_loss.GPU_COMPILED_ROWS = before

        variants: Variants = {
            "F.cross_entropy of logits": lambda: F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
        }
        compiled = CaptionLoss()
        compiled.compile_softmax()
        for chunk in (128, 256, 512) if self.device.type == "cpu" else (1024, 2048, 4096, 8192):
            variants[f"linear_cross_entropy, {chunk} rows"] = partial(ours, chunk)
            if self.device.type == "cuda":
                variants[f"the same, compiled, {chunk} rows"] = partial(ours, chunk, compiled._softmax)
        if hasattr(F, "linear_cross_entropy"):  # torch's own, from 2.13 on
            variants["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, labels, reduction="sum")
        if self.device.type == "cuda":
            variants |= self._liger(hidden, weight, labels)
        self.show(f"loss {rows} x {words}, {dtype}", variants)

    @staticmethod
    def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Variants:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        except ImportError:
            return {}
        return {"Liger": lambda: liger(hidden, weight, labels, reduction="sum")}

    def attention(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        q, k, v = (self.random(*shape, dtype=dtype) for _ in range(3))

        def attend(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).sum()

        backends = {"fused (flash)": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}
        if self.device.type == "cuda":
            backends |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
        variants: Variants = {name: partial(attend, which) for name, which in backends.items()}
        if self.device.type == "cuda":
            variants["written out, compiled"] = torch.compile(
                lambda: ((q @ k.mT * shape[-1] ** -0.5).float().softmax(-1).to(v.dtype) @ v).sum()
            )
        self.show(f"attention {shape}, {dtype}", variants)

    def captions(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Caption tokens that see the image tokens and the captions before them."""
        rows, heads, text, image, width = shape
        q = self.random(rows, heads, text, width, dtype=dtype)
        k, v = (self.random(rows, heads, image + text, width, dtype=dtype) for _ in range(2))
        mask = prefix_mask(image, image + text, self.device)[image:]
        variants: Variants = {
            "a boolean mask": lambda: F.scaled_dot_product_attention(q, k, v, mask).sum(),
            "causal_lower_right": lambda: F.scaled_dot_product_attention(
                q, k, v, causal_lower_right(text, image + text)
            ).sum(),
        }
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError:
            pass
        else:
            flex = torch.compile(flex_attention)
            block = create_block_mask(
                lambda b, h, i, j: j <= i + image, None, None, text, image + text, device=str(self.device)
            )
            variants["flex_attention"] = lambda: flex(q, k, v, block_mask=block).sum()
        self.show(f"captions {shape}, {dtype}", variants)

    def patches(self, dtype: torch.dtype, resolution: int, batch: int, width: int = 1024, patch: int = 14) -> None:
        """Gradient of the weight alone, as pixels want none."""
        images = torch.randn(batch, 3, resolution, resolution, device=self.device, dtype=dtype)
        weight = self.random(width, 3, patch, patch, dtype=dtype)
        last = images.to(memory_format=torch.channels_last)
        grid = resolution // patch

        def linear() -> Tensor:
            rows = images.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)
            return F.linear(rows.reshape(batch * grid * grid, -1), weight.flatten(1)).sum()

        variants: Variants = {
            "convolution": lambda: F.conv2d(images, weight, stride=patch).sum(),
            "convolution, channels_last": lambda: F.conv2d(
                last, weight.to(memory_format=torch.channels_last), stride=patch
            ).sum(),
            "linear": linear,
        }
        self.show(f"patches of {batch} x {resolution} px, {dtype}", variants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=("loss", "attention", "captions", "patches"), default=[])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(args.device, args.repetitions)
    gpu = bench.device.type == "cuda"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else f'{args.threads} threads'}")
    groups: dict[str, list[tuple[Any, ...]]] = {
        "loss": [()],
        "attention": [(shape,) for shape in (GPU_SHAPES if gpu else CPU_SHAPES)],
        "captions": [(shape,) for shape in CAPTIONS] if gpu else [],
        "patches": [(224, 256), (84, 512)] if gpu else [(112, 16, 384)],
    }
    for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
        for name in args.only or groups:
            if not groups[name]:
                print(f"{name}: on a GPU alone")
            for arguments in groups[name]:
                getattr(bench, name)(dtype, *arguments)


if __name__ == "__main__":
    main()

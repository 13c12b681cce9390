"""How one process computes: device, precision, the fastest kernels there, and what the backward pass recomputes.

Shapes: B batch, C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from open_clip_ov2.core.attention import has_half_kernels
from open_clip_ov2.core.packing import CPU_TOKENS, GPU_HALF_TOKENS, GPU_TOKENS, PackedCaptions, pack_captions

# OpenCLIP's names of precisions (open_clip_train/params.py of 3.3.0); all others are float32.
AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}
INPUT = {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16, "pure_fp16": torch.float16}
ENCODERS = ("blocks", "whole", "cuda-graphs")  # how an encoder is compiled
FLOAT8 = ("on", "emulated")  # whether its matrix products are in float8


@dataclass(frozen=True)
class Compute:
    """What a forward pass needs to know of its surroundings. `precision` is OpenCLIP's name; `mean` and `std` of each
    channel normalize uint8 images; float images are taken as normalized already."""

    device: torch.device
    precision: str
    world_size: int
    eos_id: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """torch's autocast for the precisions that have one."""
        dtype = AUTOCAST.get(self.precision)
        return contextlib.nullcontext() if dtype is None else torch.amp.autocast(self.device.type, dtype=dtype)

    def attention(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward, which may recompute. In bfloat16 on a CPU this is torch's plain attention, which
        has its scores in float32 too: the fused kernel takes twice as long there (scripts/kernel_bench.py)."""
        if self.device.type == "cpu" and self.precision != "fp32":
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around a forward pass without gradients."""
        with torch.no_grad(), self.attention(), self.autocast():
            yield

    def packed(self, texts_BL: Tensor, images: Any = None) -> PackedCaptions:
        """Captions side by side, from ids `(B, L)` int64 that are still on the CPU, and their images."""
        if self.device.type == "cpu":
            tokens = CPU_TOKENS
        elif self.precision != "fp32" and has_half_kernels(self.device):
            tokens = GPU_HALF_TOKENS
        else:
            tokens = GPU_TOKENS
        return pack_captions(texts_BL, self.eos_id, tokens, getattr(images, "counts", None))

    def pixels(self, images_BCHW: Any) -> Any:
        """`(B, C, H, W)`, or NativeImages, on the device, where uint8 images are scaled and normalized as torchvision's
        ToTensor and Normalize do it. Raises ValueError for uint8 images without `mean` and `std`."""
        if not isinstance(images_BCHW, Tensor):
            return replace(images_BCHW, patches_nCPP=self.pixels(images_BCHW.patches_nCPP))
        dtype = INPUT.get(self.precision)
        if images_BCHW.dtype != torch.uint8:
            return images_BCHW.to(self.device, dtype=dtype, non_blocking=True)
        pixels = images_BCHW.to(self.device, non_blocking=True).float().div_(255)
        pixels = pixels.sub_(_per_channel(self.mean, self.device)).div_(_per_channel(self.std, self.device))
        return pixels if dtype is None else pixels.to(dtype)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has units for products of bfloat16 matrices (AVX512-BF16 or AMX) and torch may use them
    (ATEN_CPU_CAPABILITY). Any other CPU emulates them, several times slower than float32."""
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return units and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`(C, 1, 1)` float32; cached, since making it waits for the device."""
    if not values:
        raise ValueError("images are uint8, and there is no mean and std to normalize them with")
    return torch.tensor(values, device=device).view(-1, 1, 1)


def recompute(enabled: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's result. If `enabled`, its activations are not kept: the backward pass computes them again."""
    return checkpoint(function, *arguments, use_reentrant=False) if enabled else function(*arguments)


def product_of(
    cheap: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor], x: Tensor, elementwise: bool
) -> Tensor:
    """`product(cheap(x))`, of a norm or a GELU and a matrix product. If `elementwise`, only `x` is kept for the
    backward pass, which computes `cheap` again, but never the product: torch stops as soon as it has its input."""
    if not elementwise:
        return product(cheap(x))
    return checkpoint(lambda x: product(cheap(x)), x, use_reentrant=False, preserve_rng_state=False)


def compile_backend(
    memory_budget: float | None = None, elementwise: bool = False, cuda_graphs: bool = False
) -> Callable[..., Any]:
    """A backend for torch.compile: its own, that keeps less for the backward pass, or replays CUDA graphs. Raises
    ValueError; ImportError if torch has no such option.

    `memory_budget`, 0 to 1, is the part that is kept: 0 keeps the inputs alone, 1 what it keeps by itself
    (torch._functorch.config.activation_memory_budget, which solves a knapsack of operators by their FLOPs and bytes).
    `elementwise` computes norms and GELUs again even where a matrix product of the backward pass reads them.
    """
    if memory_budget is not None and not 0.0 <= memory_budget <= 1.0:
        raise ValueError(f"memory_budget must lie in [0, 1], got {memory_budget}")
    options: dict[str, Any] = {} if memory_budget is None else {"activation_memory_budget": memory_budget}
    options |= {"ban_recompute_materialized_backward": False} if elementwise else {}

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._functorch import config  # here: importing inductor costs seconds
        from torch._inductor.compile_fx import compile_fx

        if missing := [name for name in options if not hasattr(config, name)]:
            raise ImportError(f"this torch has no torch._functorch.config.{missing[0]}; pip install 'torch>=2.6'")
        with config.patch(**options):
            return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": cuda_graphs})

    return backend

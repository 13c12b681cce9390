"""What a training step keeps for its backward pass: bytes by kind of tensor, of ov2 and of stock OpenCLIP's CoCa, on a
GPU in bfloat16 autocast. No GPU is needed: torch's fake tensors have shapes and no data.

    python scripts/activation_bytes.py [--model ov2-vit-l-14] [--resolution 224] [--batch-size 128]
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from open_clip import CoCaLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from open_clip_ov2.compare.bench.measured_step import Vocabulary, synthetic_batch
from open_clip_ov2.compare.bench.settings import CaptionLengths
from open_clip_ov2.core import CaptionLoss, CaptionModel, attention
from open_clip_ov2.core.packing import GPU_HALF_TOKENS, pack_captions

CUDA = torch.device("cuda")


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, is_causal: bool = False) -> Tensor:
    """What torch's choice of a kernel keeps: inputs, output and log sums; FlashAttention takes no mask."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = attn_mask.to(q.dtype).expand(*q.shape[:2], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake tensors on a GPU that is not there, under autocast, with the kernels that it would choose."""
    replaced = [
        patch.object(F, "scaled_dot_product_attention", fused),
        patch.object(attention, "_has_half_kernels", lambda device: device.type == "cuda"),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ]
    with contextlib.ExitStack() as stack:
        for one in replaced:
            stack.enter_context(one)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        stack.callback(torch.set_autocast_enabled, "cuda", False)
        stack.callback(torch.clear_autocast_cache)
        stack.callback(torch.autocast_decrement_nesting)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


class Kept:
    """Bytes of the storages that autograd keeps, each once, by shape and data type; weights are left out."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {id(p.untyped_storage()): p.untyped_storage() for p in model.parameters()}
        self._weights = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
        self.by_kind: Counter[str] = Counter()

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen[id(storage)] = storage  # alive, so that no other one gets its id
            copy = tuple(tensor.shape) in self._weights or tuple(tensor.shape)[::-1] in self._weights
            kind = "copies of weights" if copy else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            self.by_kind[kind] += storage.nbytes()
        return tensor


def kept(name: str, resolution: int, batch_size: int, elementwise: bool) -> Counter[str]:
    """Of one forward pass and its loss."""
    with torch.device("meta"):
        model: Any = open_clip.create_model(name, device="meta", load_weights=False, force_image_size=resolution)
    words = Vocabulary(model.vocab_size if hasattr(model, "vocab_size") else 49_408, 49_406, 49_407, 0)
    lengths = CaptionLengths(high=min(128, model.context_length))
    _, texts = synthetic_batch(batch_size, 1, model.context_length, lengths, words, 0)
    packed = pack_captions(texts, words.eos_id, GPU_HALF_TOKENS)
    if elementwise:
        model.recompute_elementwise()
    with as_on_a_gpu():
        model.train().to_empty(device="cuda")
        found = Kept(model)
        images = torch.empty(batch_size, 3, resolution, resolution, device="cuda")
        with torch.autograd.graph.saved_tensors_hooks(found.keep, lambda tensor: tensor):
            if isinstance(model, CaptionModel):
                model(images, captions=packed.to(CUDA), caption_loss=CaptionLoss())
            else:
                out = model(images, texts.to("cuda"))
                CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**out)
    return found.by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ov2-vit-l-14")
    parser.add_argument("--coca", default="coca_ViT-L-14")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--kinds", type=int, default=12, help="of tensors, shown for each; the rest is summed")
    args = parser.parse_args()
    for name, elementwise in ((args.model, False), (args.model, True), (args.coca, False)):
        found = kept(name, args.resolution, args.batch_size, elementwise)
        print(f"\n{name}{', norms and GELUs recomputed' if elementwise else ''}: {found.total() / 1e9:.2f} GB")
        shown = found.most_common(args.kinds)
        for kind, size in [*shown, ("the rest", found.total() - sum(size for _, size in shown))]:
            print(f"  {size / 1e9:7.2f} GB  {kind}")


if __name__ == "__main__":
    main()

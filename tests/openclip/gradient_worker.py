"""Ranks of test_step.py: gradients of one optimizer step over this process's part of a batch of 8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from open_clip import ClipLoss
from torch.nn.parallel import DistributedDataParallel

from open_clip_ov2.core import CaptionLoss, CaptionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.openclip.models.factory import build_caption_model
from open_clip_ov2.openclip.run.optimizers import ddp_on_any_device
from open_clip_ov2.train.step import StepSettings, optimizer_step

BOS, EOS = 10, 11


PAIR = {"contrastive_cfg": {"width": 16, "layers": 1, "heads": 2}}  # OpenVision 1's text encoder


def model_of(**more: Any) -> CaptionModel:
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 9, "vocab_size": 12, "bos_id": BOS, "eos_id": EOS},
        "decoder_cfg": {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32},
        "keep_ratio": 1.0,
    }
    return build_caption_model(**config | more).train()


def whole_batch() -> Batch:
    """Eight samples with captions of one to seven words, short ones first: halves differ in their token counts."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    texts = torch.zeros(8, 9, dtype=torch.long)
    for row in range(8):
        words = torch.randint(0, 10, (min(row + 1, 7),), generator=generator)
        ids = torch.cat([torch.tensor([BOS]), words, torch.tensor([EOS])])
        texts[row, : len(ids)] = ids
    return Batch(images, texts, [str(row) for row in range(8)], [""] * 8, [""] * 8, {})


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(value if isinstance(value, dict) else value[start:stop] for value in batch[:6]))


def settings(world_size: int, accum_freq: int, clip: float | None = None, weights: Any = (2.0,)) -> StepSettings:
    return StepSettings(Compute(torch.device("cpu"), "fp32", world_size, EOS), accum_freq, clip, *weights)


def write_gradients(out: Path, accum_freq: int, reduction: str = "fp32", pair: bool = False) -> int:
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, contrast = model_of(**(PAIR if pair else {})), None
    if pair:
        contrast = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    size = 8 // world_size // accum_freq
    starts = [rank * 8 // world_size + index * size for index in range(accum_freq)]
    window = [part(whole_batch(), start, start + size) for start in starts]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ddp = ddp_on_any_device(DistributedDataParallel, reduction)(model)
    loss, options = CaptionLoss(contrast=contrast), settings(world_size, accum_freq)
    result = optimizer_step(ddp, window, loss, optimizer, None, options)
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"gradients": gradients, "losses": result.losses(options), "norm": result.grad_norm}, out)
    torch.distributed.destroy_process_group()
    return 0


def write_windows(folder: Path, tokens_per_step: int) -> int:
    """How many batches each step of this rank has. Rank 0 gets the odd rows as batches of one, rank 1 the even ones."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batches = [part(whole_batch(), row, row + 1) for row in range(rank, 8, 2)]
    by_tokens = replace(settings(2, 1), tokens_per_step=tokens_per_step)
    (folder / str(rank)).write_text(" ".join(str(len(window)) for window in by_tokens.windows(batches)))
    torch.distributed.destroy_process_group()
    return 0

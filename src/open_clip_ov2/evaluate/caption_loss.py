"""Exact caption loss over a whole set, the same on any number of processes.

Shapes: B batch, N image tokens, K kept image tokens, L caption tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, CaptionModel, caption_targets, num_kept
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.loss import CaptionLossSums
from open_clip_ov2.core.packing import PackedCaptions
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.data.skips import merge_counts
from open_clip_ov2.evaluate.eval_model import all_gathered
from open_clip_ov2.evaluate.skipped import all_keys

EVAL_SEED = 0  # which tokens are kept at evaluation depends on this and the sample's key alone


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DDP."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "module", model)


def kept_by_key(keys: Sequence[str], num_tokens: int, kept: int) -> Tensor:
    """Token dropping of evaluation, `(B, K)` int64: a function of each sample's key, so that neither the
    batch size nor the number of processes changes the result."""
    seeds = [(EVAL_SEED, zlib.crc32(key.encode("utf-8", "surrogatepass"))) for key in keys]
    rows = [np.random.default_rng(seed).permutation(num_tokens)[:kept] for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def eval_kept_idx(model: CaptionModel, keys: Sequence[str], keep_ratio: float | None = None) -> Tensor | None:
    """`kept_by_key` at the model's evaluation ratio or the one given; None where the model by itself keeps all."""
    rows, columns = model.visual.grid_size
    num_tokens = rows * columns
    own = num_kept(num_tokens, model.token_drop.eval_keep_ratio)
    kept = own if keep_ratio is None else num_kept(num_tokens, keep_ratio)
    if kept == own == num_tokens:
        return None
    return kept_by_key(keys, num_tokens, kept).to(model.visual.positional_embedding.device)


@torch.no_grad()
def caption_loss(
    model: nn.Module, batches: Iterable[Batch], compute: Compute, keep_ratio: float | None = None
) -> dict[str, Any]:
    """Caption loss (nats a token) and perplexity over this process's batches and all others'; where they have
    groups, the same of each as `by_kind` (samples without one are in the whole alone)."""
    model = unwrap(model)
    model.eval()
    sums: dict[str, list[float]] = {}  # by kind: nll, targets, samples
    for batch in batches:
        for kind, part in _by_kind(batch):
            found = _sums(model, part, compute, keep_ratio)
            added = (float(found.nll), float(found.num_targets), float(len(part.keys)))
            sums[kind] = [before + one for before, one in zip(sums.get(kind, (0.0,) * 3), added, strict=True)]
    sums = _all_sums(sums, compute.world_size)
    whole = _loss(map(sum, zip(*sums.values(), strict=True)))
    kinds = {kind: _loss(sums[kind]) for kind in sorted(sums) if kind}
    return {**whole, "by_kind": kinds} if kinds else whole


def _by_kind(batch: Batch) -> list[tuple[str, Batch]]:
    """Parts of a batch whose samples are of one group; all of it where they have none."""
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(batch.groups or [""] * len(batch.keys)):
        places.setdefault(kind, []).append(place)
    return [(kind, batch if len(places) == 1 else rows_of(batch, rows)) for kind, rows in places.items()]


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """These samples of an evaluation's batch."""
    chosen = torch.tensor(rows, dtype=torch.long)
    return batch._replace(
        images_BCHW=batch.images_BCHW[chosen],
        texts_BL=batch.texts_BL[chosen],
        keys=[batch.keys[row] for row in rows],
        captions=[batch.captions[row] for row in rows],
        groups=[batch.groups[row] for row in rows],
        indices=tuple(batch.indices[row] for row in rows),
    )


def _sums(model: nn.Module, batch: Batch, compute: Compute, keep_ratio: float | None) -> CaptionLossSums:
    images = compute.pixels(batch.images_BCHW)
    with compute.attention(), compute.autocast():
        if isinstance(model, CaptionModel):
            captions = compute.packed(batch.texts_BL).to(compute.device)
            return _family_sums(model, images, captions, batch.keys, keep_ratio)
        return _coca_sums(model, images, batch.texts_BL.to(compute.device), compute.eos_id)


def _all_sums(sums: dict[str, list[float]], world_size: int) -> dict[str, list[float]]:
    """Of all processes."""
    parts = all_gathered(sums, world_size)
    kinds = sorted({kind for part in parts for kind in part})
    return {
        kind: [math.fsum(row) for row in zip(*(p[kind] for p in parts if kind in p), strict=True)] for kind in kinds
    }


def _loss(sums: Iterable[float]) -> dict[str, float]:
    nll_sum, targets, samples = tuple(sums) or (0.0, 0.0, 0.0)
    loss = nll_sum / max(targets, 1.0)
    return {"caption_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_samples": samples}


def _family_sums(
    model: CaptionModel, images: Tensor, captions: PackedCaptions, keys: Sequence[str], keep_ratio: float | None
) -> CaptionLossSums:
    kept_idx = eval_kept_idx(model, keys, keep_ratio)
    return model(images, kept_idx=kept_idx, captions=captions, caption_loss=CaptionLoss())


def _coca_sums(model: nn.Module, images: Tensor, texts: Tensor, eos_id: int) -> CaptionLossSums:
    logits = model(images, texts)["logits"]  # aligned with text[:, 1:]
    labels = caption_targets(texts, eos_id)
    assert logits.shape[:2] == labels.shape, (logits.shape, labels.shape, IGNORE_INDEX)
    return CaptionLoss()(logits, labels)


def gathered_keys(keys: Mapping[str, list[str]], world_size: int) -> dict[str, list[str]]:
    """Keys of skipped samples by cause, of all processes."""
    return all_keys(all_gathered(keys, world_size))


def gathered_counts(counts: dict[str, int], world_size: int) -> dict[str, int]:
    """Counts by name, summed over all processes."""
    return merge_counts(all_gathered(counts, world_size))


def to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised float `(B, 3, H, W)` -> uint8, for looking at."""
    mean_C11, std_C11 = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return ((images.float().cpu() * std_C11 + mean_C11).clamp(0, 1) * 255).round().to(torch.uint8)

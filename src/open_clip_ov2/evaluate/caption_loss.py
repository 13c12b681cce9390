"""Exact caption loss over a whole set, the same on any number of processes.

Shapes: B batch, N image tokens, K kept image tokens, L caption tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.core import CaptionModel, num_kept
from open_clip_ov2.core.native import Images, NativeImages
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.gathering import all_gathered

EVAL_SEED = 0  # which tokens are kept in evaluation depends on this and the sample's key alone


def kept_by_key(keys: Sequence[str], num_tokens: int, kept: int) -> Tensor:
    """Token dropping in evaluation, `(B, K)` int64: a function of each sample's key, so that neither the batch size nor
    the number of processes changes the result."""
    seeds = [(EVAL_SEED, zlib.crc32(key.encode("utf-8", "surrogatepass"))) for key in keys]
    rows = [np.random.default_rng(seed).permutation(num_tokens)[:kept] for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def eval_kept_idx(
    model: CaptionModel, keys: Sequence[str], keep_ratio: float | None = None, images: Images | None = None
) -> Tensor | list[Tensor] | None:
    """`kept_by_key` at `keep_ratio`, by default the model's own in evaluation; None if all tokens are kept. Of
    NativeImages for each `(K,)`."""
    own = model.token_drop.eval_keep_ratio
    ratio = own if keep_ratio is None else keep_ratio
    if isinstance(images, NativeImages):
        each = zip(keys, images.counts, strict=True)
        whole = ratio == own == 1
        return None if whole else [kept_by_key([key], count, num_kept(count, ratio))[0] for key, count in each]
    num_tokens = math.prod(model.visual.grid_size)
    kept = num_kept(num_tokens, ratio)
    if kept == num_kept(num_tokens, own) == num_tokens:
        return None
    return kept_by_key(keys, num_tokens, kept).to(model.visual.positional_embedding.device)


def caption_loss(model: EvalModel, batches: Iterable[Batch]) -> dict[str, Any]:
    """Caption loss (nats per token) and perplexity over this process's batches and all others'. Where samples have
    groups, the same of each group as `by_kind`; samples without one count in the whole alone."""
    sums: dict[str, tuple[float, ...]] = {}  # by kind: nll, targets, samples
    for batch in batches:
        for kind, part in _by_kind(batch):
            added = (*model.loss_sums(part.images_BCHW, part.texts_BL, part.keys), float(len(part.keys)))
            sums[kind] = tuple(map(sum, zip(sums.get(kind, (0.0,) * 3), added, strict=True)))
    parts = all_gathered(sums)
    kinds = {
        kind: tuple(map(math.fsum, zip(*(part[kind] for part in parts if kind in part), strict=True)))
        for kind in sorted({kind for part in parts for kind in part})
    }
    whole = _loss(*map(sum, zip(*kinds.values(), strict=True))) if kinds else _loss(0.0, 0.0, 0.0)
    by_kind = {kind: _loss(*found) for kind, found in kinds.items() if kind}
    return {**whole, "by_kind": by_kind} if by_kind else whole


def _loss(nll_sum: float, targets: float, samples: float) -> dict[str, float]:
    loss = nll_sum / max(targets, 1.0)
    return {"caption_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_samples": samples}


def _by_kind(batch: Batch) -> list[tuple[str, Batch]]:
    """The samples of a batch by group; all of them together if they have none."""
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

"""Recall from image to text and from text to image, by any score of an image and a text.

Candidates are the different texts of the set: a text that equals one of an image's own captions is right, whichever
image it was written for. Where no two captions are equal, this is the usual recall (Karpathy and Fei-Fei 2015, arXiv
1412.2306, section 4.2). A process holds the scores of its own images only.

Shapes: B batch, m images of this process, U different texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import NOT_FINITE
from open_clip_ov2.evaluate.gathering import all_gathered, gathered

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Captions:
    """`texts`: all different ones, by first appearance. `own`: those of each sample, by its place in the file order."""

    texts: tuple[str, ...]
    own: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, loader: EvalLoader) -> Captions:
        """Every caption of the whole set. Raises UserError if it has none."""
        number: dict[str, int] = {}
        own: dict[int, tuple[int, ...]] = {}
        for sample in loader.described():
            own[sample.place] = tuple(dict.fromkeys(number.setdefault(text, len(number)) for text in sample.captions))
        if not number:
            raise UserError("retrieval: the data have no captions; check --caption-keys")
        return cls(tuple(number), own)


@dataclass(frozen=True)
class Scores:
    """Of this process's images: `indices_m` int64, `own` the right texts of each, `values_mU` float64, rounded.

    Texts are those of all processes' images that can be used.
    """

    indices_m: Tensor
    own: list[tuple[int, ...]]
    values_mU: Tensor
    world_size: int
    decimals: int

    def changed(self, values_mU: Tensor) -> Scores:
        return replace(self, values_mU=values_mU.round(decimals=self.decimals))


def places_of_texts(scores: Scores) -> dict[int, int]:
    """The place from 0 of the first of its own texts, of each image of all processes; equal scores in text order."""
    places = {}
    for index, own, row_U in zip(scores.indices_m.tolist(), scores.own, scores.values_mU, strict=True):
        best = row_U[list(own)].max()
        first = min(text for text in own if row_U[text] == best)
        places[index] = int((row_U > best).sum() + (row_U[:first] == best).sum())
    return gathered(places, scores.world_size)


def places_of_pictures(scores: Scores) -> Tensor:
    """The place from 0 of the first of its own images, of each text `(U,)` int64; equal scores in file order."""
    texts, never = scores.values_mU.shape[1], torch.iinfo(torch.int64).max
    best_U, first_U = torch.full((texts,), -torch.inf, dtype=torch.float64), torch.full((texts,), never)
    for row, own in enumerate(scores.own):  # in file order, so the first of equals stays
        columns = torch.tensor(own)
        better = columns[scores.values_mU[row, columns] > best_U[columns]]
        best_U[better], first_U[better] = scores.values_mU[row, better], scores.indices_m[row]
    everyone = all_gathered((best_U, first_U), scores.world_size)
    best_U = torch.stack([best for best, _ in everyone]).amax(dim=0)
    firsts = [first.where(best == best_U, never) for best, first in everyone]
    first_U = torch.stack(firsts).amin(dim=0)
    before_mU = scores.indices_m[:, None] < first_U
    better_mU = (scores.values_mU > best_U) | ((scores.values_mU == best_U) & before_mU)
    return torch.stack(all_gathered(better_mU.sum(dim=0), scores.world_size)).sum(dim=0)


def log_mean(scores: Scores) -> Tensor:
    """Log of the mean of the exponentials over all images, `(U,)` float64: log p(text) where scores are
    log p(text | image)."""
    sums = all_gathered((scores.values_mU.logsumexp(dim=0), len(scores.own)), scores.world_size)
    return torch.stack([sum_U for sum_U, _ in sums]).logsumexp(dim=0) - math.log(sum(count for _, count in sums))


def recall(what: str, places: Tensor, candidates: int) -> dict[str, float | None]:
    """`{what}_recall_at_1`, 5, 10: shares of `places` int64 below that; None where there are no more candidates."""
    shares = {k: (places < k).double().mean().item() for k in RECALL_AT if k < candidates}
    return {f"{what}_recall_at_{k}": shares.get(k) for k in RECALL_AT}


def scored(
    loader: EvalLoader, captions: Captions, scores: Callable[[Batch], Tensor], world_size: int, decimals: int
) -> tuple[Scores, Tensor, dict[str, Any]]:
    """(scores, the texts of its columns as places in `captions.texts` `(U,)`, counts that are JSON-ready).

    `scores` gives `(B, all texts)` of a batch, which is rounded to `decimals`.
    Raises UserError if fewer than two images or texts are left.
    """
    keys: dict[int, str] = {}
    skipped: dict[int, str] = {}
    rows: dict[int, Tensor] = {}
    for batch in loader:
        values_BU = scores(batch).double().cpu()
        for index, key, row_U in zip(batch.indices, batch.keys, values_BU, strict=True):
            if row_U.isfinite().all():
                keys[index], rows[index] = key, row_U
            else:
                skipped[index] = key
    used = gathered(keys, world_size)
    texts = sorted({text for index in used for text in captions.own[index]})
    if len(used) < 2 or len(texts) < 2:
        raise UserError(f"retrieval needs two images and two different captions; found {len(used)} and {len(texts)}")
    column = {text: place for place, text in enumerate(texts)}
    mine = sorted(rows)
    values = [rows[index][texts] for index in mine]
    values_mU = torch.stack(values) if values else torch.empty(0, len(texts), dtype=torch.float64)
    own = [tuple(column[text] for text in captions.own[index]) for index in mine]
    counts = {
        "n_images": len(used),
        "n_texts": len(texts),
        "skipped": {NOT_FINITE: list(gathered(skipped, world_size).values())},
    }
    part = Scores(torch.tensor(mine, dtype=torch.int64), own, values_mU.round(decimals=decimals), world_size, decimals)
    return part, torch.tensor(texts), counts


def both_ways(scores: Scores) -> dict[str, Any]:
    """Recall from image to text and from text to image."""
    by_picture = places_of_texts(scores)
    by_text_U = places_of_pictures(scores)
    return {
        **recall("image_to_text", torch.tensor(list(by_picture.values())), len(by_text_U)),
        **recall("text_to_image", by_text_U, len(by_picture)),
    }

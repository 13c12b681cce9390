"""Recall of texts by pictures and of pictures by texts, from any score of a picture and a text.

Candidates are the different texts of the set: a text that equals one of a picture's own captions is right, whichever
picture it was written for. Where no two captions are equal, this is the usual recall (Karpathy and Fei-Fei 2015,
arXiv 1412.2306, section 4.2). A process holds the scores of its own pictures alone.

Shapes: B batch, M pictures, m those of this process, U different texts.
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
from open_clip_ov2.evaluate.eval_model import Value, gathered

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
            raise UserError("retrieval: the data has no caption; look at --caption-keys")
        return cls(tuple(number), own)


@dataclass(frozen=True)
class Scores:
    """This process's part: `indices_m` int64, `own` the right texts of each, `values_mU` float64, rounded.

    Texts are those of pictures that can be used, of all processes.
    """

    indices_m: Tensor
    own: list[tuple[int, ...]]
    values_mU: Tensor
    world_size: int
    decimals: int

    def changed(self, values_mU: Tensor) -> Scores:
        return replace(self, values_mU=values_mU.round(decimals=self.decimals))


def places_of_texts(scores: Scores) -> dict[int, int]:
    """Of each picture of all processes, the place from 0 of the first of its own texts; equal scores in the order of
    the texts."""
    places = {}
    for index, own, row_U in zip(scores.indices_m.tolist(), scores.own, scores.values_mU, strict=True):
        best = row_U[list(own)].max()
        first = min(text for text in own if row_U[text] == best)
        places[index] = int((row_U > best).sum() + (row_U[:first] == best).sum())
    return gathered(places, scores.world_size)


def places_of_pictures(scores: Scores) -> Tensor:
    """Of each text, the place from 0 of the first of its own pictures, `(U,)` int64; equal scores in file order."""
    texts, never = scores.values_mU.shape[1], torch.iinfo(torch.int64).max
    best_U, first_U = torch.full((texts,), -torch.inf, dtype=torch.float64), torch.full((texts,), never)
    for row, own in enumerate(scores.own):  # in file order, so the first of equals stays
        columns = torch.tensor(own)
        better = columns[scores.values_mU[row, columns] > best_U[columns]]
        best_U[better], first_U[better] = scores.values_mU[row, better], scores.indices_m[row]
    everyone = _everyones((best_U, first_U), scores.world_size)
    best_U = torch.stack([best for best, _ in everyone]).amax(dim=0)
    firsts = [first.where(best == best_U, never) for best, first in everyone]
    first_U = torch.stack(firsts).amin(dim=0)
    before_mU = scores.indices_m[:, None] < first_U
    better_mU = (scores.values_mU > best_U) | ((scores.values_mU == best_U) & before_mU)
    return torch.stack(_everyones(better_mU.sum(dim=0), scores.world_size)).sum(dim=0)


def log_mean(scores: Scores) -> Tensor:
    """Log of the mean over all pictures of the exponentials, `(U,)` float64: log p(text) where scores are
    log p(text | picture)."""
    sums = _everyones((scores.values_mU.logsumexp(dim=0), len(scores.own)), scores.world_size)
    return torch.stack([sum_U for sum_U, _ in sums]).logsumexp(dim=0) - math.log(sum(count for _, count in sums))


def recall(what: str, places: Tensor, candidates: int) -> dict[str, float | None]:
    """`{what}_recall_at_1`, 5, 10: shares of `places` int64 among the first; None where that is certain beforehand."""
    shares = {k: (places < k).double().mean().item() for k in RECALL_AT if k < candidates}
    return {f"{what}_recall_at_{k}": shares.get(k) for k in RECALL_AT}


def scored(
    loader: EvalLoader, captions: Captions, scores: Callable[[Batch], Tensor], world_size: int, decimals: int
) -> tuple[Scores, Tensor, dict[str, Any]]:
    """(scores, the texts of its columns as places in `captions.texts` `(U,)`, what there is of each, JSON-ready).

    `scores`: `(B, all texts)` of a batch, compared to so many `decimals`.
    Raises UserError if fewer than two pictures or texts are left.
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
        raise UserError(f"retrieval takes two pictures and two different captions; there are {len(used)}, {len(texts)}")
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
    """Recall of texts by pictures and of pictures by texts."""
    by_picture = places_of_texts(scores)
    by_text_U = places_of_pictures(scores)
    return {
        **recall("image_to_text", torch.tensor(list(by_picture.values())), len(by_text_U)),
        **recall("text_to_image", by_text_U, len(by_picture)),
    }


def _everyones(value: Value, world_size: int) -> list[Value]:
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    return list(gathered({rank: value}, world_size).values())

"""k-nearest-neighbor classification: without training, and with no choice but k.

Weighted as in DINO (arXiv 2104.14294, section 3.2, after arXiv 1805.01978, section 3.4): of cosine similarity s, each
of the k nearest votes for its class with exp(s / 0.07). Plain: each votes with 1.

Shapes: M test samples, T training samples, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.evaluate.classes import accuracy, match_labels, ranks
from open_clip_ov2.evaluate.extraction import Features

TEMPERATURE = 0.07  # DINO's, from arXiv 1805.01978
NEIGHBOURS = (10, 20, 100, 200)  # DINO's list
HEADLINE = 20  # DINO: works best consistently; a k chosen on the test set would flatter
DECIMALS = 9  # ours: equal images are equally near, wherever in a matrix product they stood
BLOCK_BYTES = 1 << 28  # ours: similarities held at once


def nearest(train_TD: Tensor, test_MD: Tensor, k: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(cosine similarities `(M, k)` float64, rows of the training set `(M, k)` int64), the nearest first; of equally
    near ones the first row is first."""
    train_TD = F.normalize(train_TD.to(device, torch.float64), dim=1)
    found = []
    for block_BD in test_MD.split(max(1, BLOCK_BYTES // (8 * len(train_TD)))):
        similar_BT = F.normalize(block_BD.to(device, torch.float64), dim=1) @ train_TD.T
        found.append(_largest(similar_BT.round(decimals=DECIMALS), k))
    similar, rows = zip(*found, strict=True)
    return torch.cat(similar), torch.cat(rows)


def _largest(similar_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk leaves open which of equals comes first: rows that have any are sorted."""
    values, rows = similar_BT.topk(min(k + 1, similar_BT.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    if tied.any():
        in_order = similar_BT[tied].sort(dim=1, descending=True, stable=True)
        values[tied], rows[tied] = (part[:, : values.shape[1]] for part in in_order)
    return values[:, :k].cpu(), rows[:, :k].cpu()


def knn(
    train: Features, test: Features, *, neighbours: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Accuracy on pooled features, JSON-ready. The headline is the weighted vote of 20, or of the most that there are.
    `neighbours`: the k's, by default DINO's as far as the training set has so many samples. Equally near training
    samples come in the order of their keys, so the order of the set does not matter. Raises UserError, see
    `match_labels`."""
    labels = match_labels(train, test)
    most = len(labels.train)
    counts = neighbours or [k for k in NEIGHBOURS if k <= most] or [most]
    headline = HEADLINE if HEADLINE in counts else max(counts)
    by_key = torch.tensor(sorted(range(most), key=labels.train.keys.__getitem__))
    reference = labels.train.part(by_key)
    train_TD, test_MD = train.values[reference.rows], test.values[labels.test.rows]
    similar_MK, rows_MK = nearest(train_TD, test_MD, max(counts), device=device)
    classes_MK = reference.classes_M[rows_MK]
    weightings = {"weighted": (similar_MK / TEMPERATURE).exp(), "plain": torch.ones_like(similar_MK)}

    def places(k: int, how: str) -> Tensor:
        none_MC = similar_MK.new_full((len(similar_MK), len(labels.names)), -torch.inf)  # a class without a vote
        votes_MC = none_MC.scatter_reduce(1, classes_MK[:, :k], weightings[how][:, :k], "sum", include_self=False)
        return ranks(votes_MC, labels.test.classes_M)

    by_k = {str(k): {how: accuracy(places(k, how), len(labels.names)) for how in weightings} for k in counts}
    return {**labels.result(places(headline, "weighted")), "k": headline, "temperature": TEMPERATURE, "by_k": by_k}

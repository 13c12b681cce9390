"""Labels as text -> class numbers; scores -> accuracy.

Shapes: M samples, C classes (evaluate/__init__.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES, outcome

CHECKED_ROWS = 1 << 12  # checked at a time: token features of all are too many


@dataclass(frozen=True)
class Split:
    """The usable samples of a set: `rows` `(M,)` int64 of its features, `classes_M` int64 their classes."""

    rows: Tensor
    classes_M: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, chosen: Tensor) -> Split:
        """The samples at `chosen`, int64."""
        return Split(self.rows[chosen], self.classes_M[chosen], tuple(self.keys[row] for row in chosen.tolist()))


@dataclass(frozen=True)
class Labels:
    """The classes are those of the training set, sorted; `skipped`: keys that count nowhere, by reason."""

    names: tuple[str, ...]
    train: Split
    test: Split
    skipped: dict[str, list[str]]

    def result(self, places_M: Tensor) -> dict[str, Any]:
        """What every probe reports, JSON-ready, from the place of each test sample's class (`ranks`)."""
        scores = class_scores(places_M, self.test.classes_M, self.names)
        right = {"top1": outcome(self.test.keys, (places_M == 0).tolist())}
        return {**scores, "n_train": len(self.train), "skipped": self.skipped, OUTCOMES: right}


def match_labels(train: Features, test: Features) -> Labels:
    """The labels of both sets as class numbers. Raises UserError: fewer than two classes, no usable sample."""
    names = tuple(sorted(set(train.labels) - {""}))
    if len(names) < 2:
        raise UserError(
            f"the training set has {len(names)} classes in {len(train)} samples; expected at least 2 "
            "(--label-key says where the labels are, for example cls or json:label)"
        )
    number = {name: index for index, name in enumerate(names)}
    skipped: dict[str, list[str]] = {}
    to_fit, to_test = (_split(one, number, which, skipped) for which, one in (("training", train), ("test", test)))
    if not len(to_fit):
        raise UserError("no training sample has a label and finite features; check the model")
    if not len(to_test):
        raise UserError(
            f"none of the {len(test)} test samples has a class of the training set ({', '.join(names[:3])} ...); "
            "check --label-key"
        )
    return Labels(names, to_fit, to_test, skipped)


def _split(features: Features, number: dict[str, int], which: str, skipped: dict[str, list[str]]) -> Split:
    """The samples with a known label and finite features; the keys of the others go into `skipped`."""
    finite = [
        fine for part in features.values.split(CHECKED_ROWS) for fine in part.flatten(1).isfinite().all(1).tolist()
    ]
    samples = list(zip(features.keys, features.labels, finite, strict=True))
    skipped[f"{which} sample with features that are not finite"] = [key for key, _, fine in samples if not fine]
    skipped[f"{which} sample without a label"] = [key for key, label, _ in samples if not label]
    if which == "test":
        skipped["class unknown in training"] = [key for key, label, _ in samples if label and label not in number]
    known = [row for row, (_, label, fine) in enumerate(samples) if label in number and fine]
    classes = [number[features.labels[row]] for row in known]
    return Split(torch.tensor(known), torch.tensor(classes), tuple(features.keys[row] for row in known))


def hold_out(split: Split, share: float) -> tuple[Split, Split]:
    """(to fit, held out): `share` of each class, one sample at least but never its last; chosen by key alone, so that
    neither the order of the samples nor other classes matter. Raises UserError if no class has two samples."""
    by_class: dict[int, list[int]] = {}
    for row, number in enumerate(split.classes_M.tolist()):
        by_class.setdefault(number, []).append(row)
    is_held = torch.zeros(len(split), dtype=torch.bool)
    for rows in by_class.values():
        rows.sort(key=lambda row: (zlib.crc32(f"0/{split.keys[row]}".encode("utf-8", "replace")), split.keys[row]))
        is_held[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    if not is_held.any():
        raise UserError("no class has two training samples, so none can be held out to choose the regulariser")
    return split.part((~is_held).nonzero().flatten()), split.part(is_held.nonzero().flatten())


def ranks(scores_MC: Tensor, classes_M: Tensor) -> Tensor:
    """Place of the true class, from 0, `(M,)` int64; of equal scores the lower class number is first, and a class with
    score -inf (nothing speaks for it) is last, as is one among scores that are not numbers."""
    true_M1 = scores_MC.gather(1, classes_M[:, None])
    before = torch.arange(scores_MC.shape[1], device=scores_MC.device)[None] < classes_M[:, None]
    places = ((scores_MC > true_M1) | ((scores_MC == true_M1) & before)).sum(dim=1)
    never_M = (true_M1.flatten() == -torch.inf) | scores_MC.isnan().any(dim=1)
    return places.masked_fill(never_M, scores_MC.shape[1])


def accuracy(places_M: Tensor, num_classes: int) -> dict[str, float | None]:
    """Shares of samples whose class is first, and among the first five (None where that is certain beforehand)."""
    top5 = (places_M < 5).double().mean().item() if num_classes > 5 else None
    return {"top1": (places_M == 0).double().mean().item(), "top5": top5}


def class_scores(places_M: Tensor, classes_M: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Accuracy, right and all test samples of each class, and the mean of the classes' shares (classes without any left
    out), JSON-ready."""
    count = torch.bincount(classes_M, minlength=len(names)).tolist()
    right = torch.bincount(classes_M[places_M == 0], minlength=len(names)).tolist()
    rows = {name: {"right": r, "n": n} for name, r, n in zip(names, right, count, strict=True) if n}
    return {
        **accuracy(places_M, len(names)),
        "mean_per_class": sum(row["right"] / row["n"] for row in rows.values()) / len(rows),
        "per_class": rows,
        "n_test": len(places_M),
        "n_classes": len(names),
    }

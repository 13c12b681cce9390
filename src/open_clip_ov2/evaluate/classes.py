"""Labels as class numbers, classes as names, and the accuracy of scores.

Shapes: B batch, C classes, P templates, M samples.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.gathering import gathered
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES, outcome
from open_clip_ov2.files import read_json

PLACE = "{}"
TEMPLATES = ("a photo of a {}.",)  # CLIP, arXiv 2103.00020, section 3.1.4
NO_LABEL, UNKNOWN_CLASS, NOT_FINITE = "no label", "unknown class", "score is not finite"
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


@dataclass(frozen=True)
class Classes:
    """`names`: what the texts call them. `number`: the class of each label that the data may have."""

    names: tuple[str, ...]
    number: Mapping[str, int]

    @classmethod
    def of(cls, given: Sequence[str] | Mapping[str, str]) -> Classes:
        """From {label: name}, or from names. A name's labels are its place from 0 on and the name itself, the latter
        unless two names are equal (ImageNet's has such), the former unless a name is a number. Raises UserError."""
        names = tuple(given.values()) if isinstance(given, Mapping) else tuple(given)
        wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
        if wrong or len(set(names)) < 2:
            what = f"{wrong[0]!r} is not a name" if wrong else f"{len(set(names))} different names; expected at least 2"
            raise UserError(f"classes: {what}")
        if isinstance(given, Mapping):
            return cls(names, {str(label): place for place, label in enumerate(given)})
        count = Counter(names)
        number = {name: place for place, name in enumerate(names) if count[name] == 1}
        if not any(name.isdecimal() for name in names):
            number |= {str(place): place for place in range(len(names))}
        return cls(names, number)

    @classmethod
    def read(cls, path: Path) -> Classes:
        """A JSON file, [name, ...] or {label: name}. Raises UserError."""
        given = read_json(path, what="class names, [name, ...] or {label: name}")
        with naming(str(path)):
            return cls.of(given)

    @classmethod
    def in_data(cls, loader: EvalLoader) -> Classes:
        """The labels of the whole set as their own names, sorted. Raises UserError if they are numbers or too few."""
        labels = sorted({sample.group for sample in loader.described()} - {""})
        if labels and all(label.isdecimal() for label in labels):
            raise UserError(
                f"the data's labels are numbers ({', '.join(labels[:3])} ...); name the classes (--classes)"
            )
        if len(labels) < 2:
            raise UserError(f"the data have {len(labels)} labels; expected at least 2 (--label-key cls, json:KEY)")
        return cls.of(labels)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names that are all different: `cat (0)` and `cat (2)` where two classes are called the same."""
        count = Counter(self.names)
        return tuple(name if count[name] == 1 else f"{name} ({place})" for place, name in enumerate(self.names))

    def texts(self, templates: Sequence[str]) -> list[str]:
        """Each class in each template, class by class."""
        return [template.replace(PLACE, name) for name in self.names for template in templates]


def classify(loader: EvalLoader, classes: Classes, scores: Callable[[Batch], Tensor], decimals: int) -> dict[str, Any]:
    """Accuracy of the class with the highest score, JSON-ready; the same on any number of processes. `scores` gives
    `(B, C)` of a batch, which is rounded to `decimals`; of equal ones the first class is first. `skipped`: keys by
    reason, in no average. Raises UserError if no sample is left."""
    # Of a sample: its key, why it is skipped, its class's number, and that one's place among all.
    rows: dict[int, tuple[str, str | None, int, int]] = {}
    for batch in loader:
        scores_BC = scores(batch).double().cpu().round(decimals=decimals)
        finite = scores_BC.isfinite().all(dim=1).tolist()
        numbers = [classes.number.get(label, -1) for label in batch.groups]
        ranked = ranks(scores_BC, torch.tensor(numbers).clamp(min=0)).tolist()
        for row, index in enumerate(batch.indices):
            cause = None if finite[row] else NOT_FINITE
            if numbers[row] < 0:
                cause = UNKNOWN_CLASS if batch.groups[row] else NO_LABEL
            rows[index] = batch.keys[row], cause, numbers[row], ranked[row]
    every = gathered(rows).values()
    causes = (NO_LABEL, UNKNOWN_CLASS, NOT_FINITE)
    skipped = {cause: [key for key, why, *_ in every if why == cause] for cause in causes}
    used = [row for row in every if row[1] is None]
    if not used:
        counts = ", ".join(f"{len(keys)} with {cause}" for cause, keys in skipped.items() if keys)
        raise UserError(f"none of {len(every)} samples can be classified ({counts}); check the labels and the classes")
    keys, _, class_numbers, places = zip(*used, strict=True)
    classes_M, places_M = torch.tensor(class_numbers), torch.tensor(places)
    right = {"top1": outcome(keys, (places_M == 0).tolist())}
    return {**class_scores(places_M, classes_M, classes.shown), "skipped": skipped, OUTCOMES: right}

"""Classes as words, and pictures put into them by any score of a picture and a text.

Shapes: B batch, C classes, P templates, M samples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import gathered
from open_clip_ov2.evaluate.labels import accuracy, per_class, ranks

PLACE = "{}"
TEMPLATES = ("a photo of a {}.",)  # CLIP, arXiv 2103.00020, section 3.1.4

NO_LABEL, UNKNOWN_CLASS, NOT_FINITE = "no label", "unknown class", "score is not finite"


@dataclass(frozen=True)
class Classes:
    """`names`: the words. `number`: of each label that may stand in the data."""

    names: tuple[str, ...]
    number: Mapping[str, int]

    @classmethod
    def of(cls, given: Sequence[str] | Mapping[str, str]) -> Classes:
        """{label: name}; or names, whose labels are their places from 0 on, and they themselves unless two are the same
        (ImageNet's list has such) or one of them is a number. Raises UserError: fewer than two classes, an empty name.
        """
        names = tuple(given.values()) if isinstance(given, Mapping) else tuple(given)
        wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
        if wrong or len(set(names)) < 2:
            what = f"{wrong[0]!r} is no name" if wrong else f"{len(set(names))} different names, and two are wanted"
            raise UserError(f"the classes: {what}")
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
        try:
            given = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: no class names to be read ({error})") from error
        if not isinstance(given, (list, dict)) or not all(
            isinstance(name, str) for name in (given if isinstance(given, list) else given.values())
        ):
            raise UserError(f"{path}: class names are [name, ...] or {{label: name}}")
        return cls.of(given)

    @classmethod
    def in_data(cls, loader: EvalLoader) -> Classes:
        """The labels of the whole set as their own names, sorted. Raises UserError if they are numbers or too few."""
        labels = sorted({sample.group for sample in loader.described()} - {""})
        if labels and all(label.isdecimal() for label in labels):
            raise UserError(
                f"the data's labels are numbers ({', '.join(labels[:3])} ...): give the names of the classes"
            )
        if len(labels) < 2:
            raise UserError(
                f"the data has {len(labels)} labels, and two are wanted; say where they are (cls, json:KEY)"
            )
        return cls.of(labels)

    @property
    def shown(self) -> tuple[str, ...]:
        """Names that are all different: `cat (0)` and `cat (2)` where two classes are called the same."""
        count = Counter(self.names)
        return tuple(name if count[name] == 1 else f"{name} ({place})" for place, name in enumerate(self.names))

    def texts(self, templates: Sequence[str]) -> list[str]:
        """Each class in each template, class by class. Raises UserError for a template without `{}`."""
        wrong = [template for template in templates if PLACE not in template]
        if wrong or not templates:
            raise UserError(f"template {wrong[0] if wrong else ''!r}: {PLACE} is wanted in it, where the class goes")
        return [template.replace(PLACE, name) for name in self.names for template in templates]


@dataclass(frozen=True)
class _Row:
    key: str
    number: int  # of its class; below 0 where skipped
    place: int = -1  # of its class among all
    cause: str = ""


def classify(
    loader: EvalLoader, classes: Classes, scores: Callable[[Batch], Tensor], world_size: int, decimals: int
) -> dict[str, Any]:
    """Accuracy of the class with the highest score, JSON-ready; the same on any number of processes.

    `scores`: `(B, C)` of a batch, compared to so many `decimals`; of equal ones the first class is first.
    `skipped`: keys by reason, in no average.
    Raises UserError if no sample is left.
    """
    rows: dict[int, _Row] = {}
    for batch in loader:
        for index, row in zip(batch.indices, _rows(batch, classes, scores, decimals), strict=True):
            rows[index] = row
    every = list(gathered(rows, world_size).values())
    used = [row for row in every if row.number >= 0]
    skipped = {
        cause: [row.key for row in every if row.cause == cause] for cause in (NO_LABEL, UNKNOWN_CLASS, NOT_FINITE)
    }
    if not used:
        counts = ", ".join(f"{len(keys)} with {cause}" for cause, keys in skipped.items() if keys)
        raise UserError(f"none of {len(every)} samples can be classified ({counts}); look at labels and classes")
    places_M, classes_M = torch.tensor([row.place for row in used]), torch.tensor([row.number for row in used])
    return {
        **accuracy(places_M, len(classes.names)),
        **per_class(places_M, classes_M, classes.shown),
        "n_test": len(used),
        "n_classes": len(classes.names),
        "skipped": skipped,
    }


def _rows(batch: Batch, classes: Classes, scores: Callable[[Batch], Tensor], decimals: int) -> list[_Row]:
    numbers = [classes.number.get(label, -1) for label in batch.groups]
    if max(numbers) < 0:  # nothing to score
        return [_unused(key, label) for key, label in zip(batch.keys, batch.groups, strict=True)]
    scores_BC = scores(batch).double().cpu().round(decimals=decimals)
    finite = scores_BC.isfinite().all(dim=1).tolist()
    places = ranks(scores_BC, torch.tensor(numbers).clamp(min=0)).tolist()
    rows = []
    for key, label, number, place, fine in zip(batch.keys, batch.groups, numbers, places, finite, strict=True):
        if number < 0:
            rows.append(_unused(key, label))
        else:
            rows.append(_Row(key, number, place) if fine else _Row(key, -1, cause=NOT_FINITE))
    return rows


def _unused(key: str, label: str) -> _Row:
    return _Row(key, -1, cause=UNKNOWN_CLASS if label else NO_LABEL)

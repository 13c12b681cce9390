"""Classes as names, and images classified by any score of an image and a text.

Shapes: B batch, C classes, P templates, M samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.gathering import gathered
from open_clip_ov2.evaluate.labels import class_scores, ranks
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES, outcome
from open_clip_ov2.files import read_json

PLACE = "{}"
TEMPLATES = ("a photo of a {}.",)  # CLIP, arXiv 2103.00020, section 3.1.4

NO_LABEL, UNKNOWN_CLASS, NOT_FINITE = "no label", "unknown class", "score is not finite"


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
        try:
            return cls.of(given)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

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

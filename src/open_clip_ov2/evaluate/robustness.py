"""A measure over a range of one setting: share of image tokens kept, or resolution in px."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.subject import Subject

Measure = Callable[[Subject, EvalLoader], Mapping[str, Any]]  # JSON-ready, of a subject and a set


def keep_ratio_curve(
    subject_at: Callable[[float], Subject], loader: EvalLoader, keep_ratios: Sequence[float], measure: Measure
) -> dict[str, Any]:
    """`{"0.25": result, ...}` of one model that keeps so many of its image tokens. Raises UserError: a ratio outside
    (0, 1], one that keeps no token, a subject that cannot caption.
    """
    wrong = [ratio for ratio in keep_ratios if not 0 < ratio <= 1]
    if wrong or not keep_ratios:
        raise UserError(f"keep ratios lie in (0, 1], not {wrong[0] if wrong else 'none at all'}")
    rows: dict[str, Any] = {}
    for ratio in sorted(set(keep_ratios)):
        subject = subject_at(ratio)
        if "caption" not in subject.abilities:
            raise UserError(f"{subject.name} has no caption decoder, which is what drops image tokens")
        try:
            rows[f"{ratio:g}"] = dict(measure(subject, loader))
        except ValueError as error:  # no token would be left
            raise UserError(f"{subject.name}: {error}") from error
    return rows


def resolution_curve(
    open_at: Callable[[int], tuple[Subject, EvalLoader]], image_sizes: Iterable[int], measure: Measure
) -> dict[str, Any]:
    """`{"224": result, ...}` by image size in px, one model in memory at a time; `features.resolution_curve` is that of
    a probe. `open_at` gives a model with its position table fitted to the size, and a loader with its preprocessing.
    """
    rows: dict[str, Any] = {}
    for image_size in sorted(set(image_sizes)):
        subject, loader = open_at(image_size)
        rows[str(image_size)] = dict(measure(subject, loader))
    if not rows:
        raise UserError("no image size to measure at")
    return rows

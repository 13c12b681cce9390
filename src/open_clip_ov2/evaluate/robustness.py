"""Any measure over a range of one setting: share of image tokens kept, or resolution in px."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from open_clip_ov2.errors import UserError


def keep_ratio_curve(measure: Callable[[float], Mapping[str, Any]], keep_ratios: Sequence[float]) -> dict[str, Any]:
    """`{"0.25": result, ...}`, results JSON-ready, of one model that keeps such a share of its image tokens.

    Raises UserError: a ratio outside (0, 1], or one that leaves the model no token.
    """
    wrong = [ratio for ratio in keep_ratios if not 0 < ratio <= 1]
    if wrong or not keep_ratios:
        raise UserError(f"keep ratios lie in (0, 1], not {wrong[0] if wrong else 'none at all'}")
    rows: dict[str, Any] = {}
    for ratio in sorted(set(keep_ratios)):
        try:
            rows[f"{ratio:g}"] = dict(measure(ratio))
        except ValueError as error:  # core.num_kept's
            raise UserError(f"keep ratio {ratio:g}: {error}") from error
    return rows


def resolution_curve(measure: Callable[[int], Mapping[str, Any]], image_sizes: Sequence[int]) -> dict[str, Any]:
    """`{"224": result, ...}` by image size in px, in order of size.

    `measure` opens the model with its position table fitted to the size, so that one at a time is in memory. Raises
    UserError for sizes below one.
    """
    wrong = [size for size in image_sizes if size < 1]
    if wrong or not image_sizes:
        raise UserError(f"image sizes in pixels are wanted, not {wrong[0] if wrong else 'none at all'}")
    return {str(size): dict(measure(size)) for size in sorted(set(image_sizes))}

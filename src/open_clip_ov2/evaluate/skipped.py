"""What an evaluation could not use: reported by key, and in no average."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from open_clip_ov2.data.skips import describe


@dataclass(frozen=True)
class Skipped:
    """One sample or line that was not counted."""

    key: str
    cause: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


def all_keys(parts: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """Keys by cause from all processes, the same in whichever order they come."""
    causes = sorted({cause for part in parts for cause in part})
    return {cause: sorted(key for part in parts for key in part.get(cause, ())) for cause in causes}


def summary(skipped: Sequence[Skipped]) -> str:
    """`3 missing image, 1 bad JSON; the first: q7: missing image (a.jpg)`; empty if there are none."""
    if not skipped:
        return ""
    return f"{describe(Counter(one.cause for one in skipped))}; the first: {skipped[0]}"

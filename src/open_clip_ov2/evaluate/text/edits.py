"""Edit distance between two sequences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(true: Sequence[Hashable], generated: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that make one of the other (Levenshtein, 1966), each of cost 1.

    Of characters if strings are given, of words if lists of them are.
    """
    above = list(range(len(generated) + 1))
    for row, wanted in enumerate(true, start=1):
        left = row
        current = [left]
        for column, found in enumerate(generated, start=1):
            left = min(above[column] + 1, left + 1, above[column - 1] + (wanted != found))
            current.append(left)
        above = current
    return above[-1]

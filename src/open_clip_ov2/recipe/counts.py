"""Numbers of samples as people write them: 12.8B, 200k, 2M."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from open_clip_ov2.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}  # thousand, million, billion; never powers of two
LONGEST = 40  # characters; Python refuses to convert very long numbers
_NUMBER = re.compile(r"(\d+(?:_\d+)*)(\.\d+)?\s*([KMB]?)", re.IGNORECASE | re.ASCII)


def sample_count(least: int) -> Callable[[Any], int]:
    """A reader (see `tables`) of a number of samples >= `least`, computed exactly. It raises UserError."""

    def read(value: Any) -> int:
        text = str(value).strip()
        found = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
        if found is None or isinstance(value, (bool, float)):
            raise UserError(f"{value!r}: expected a number of samples >= {least}, such as 2_000_000 or 2M (K, M, B)")
        whole, part, unit = found.groups()
        exact = Fraction(whole.replace("_", "") + (part or "")) * UNITS[unit.upper()]
        if exact.denominator != 1 or exact < least:
            raise UserError(f"{text}: expected an integer number of samples >= {least}")
        return exact.numerator

    return read


def short_count(number: int) -> str:
    """For people to read, three significant digits: 12.8 B, 51.2 M, 512."""
    for unit in ("B", "M", "K"):
        # 999,500 and more would read "1e+03 K"
        if number >= UNITS[unit] * 0.9995:
            return f"{number / UNITS[unit]:.3g} {unit}"
    return str(number)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(size for size in range(1, max(1, min(number, limit)) + 1) if number % size == 0)

"""Numbers of samples as people write them: 12.8B, 200k, 2M."""

from __future__ import annotations

import re
from fractions import Fraction

from open_clip_ov2.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}  # thousand, million, billion; never powers of two
LONGEST = 40  # characters; Python refuses to convert very long numbers
_NUMBER = re.compile(r"(\d+(?:_\d+)*)(\.\d+)?\s*([KMB]?)", re.IGNORECASE | re.ASCII)


def parse_samples(value: str | int) -> int:
    """Exact, without floats. Raises UserError for what is no number, negative, or a fraction of a sample."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{value!r} is not a number of samples; write 2_000_000 or 2M (K, M, B)")
    if isinstance(value, int):
        if value < 0:
            raise UserError(f"{value} is negative; a number of samples is at least 0")
        return value
    text = value.strip()
    found = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        if text.startswith("-") and _NUMBER.fullmatch(text[1:].lstrip()):
            raise UserError(f"{text} is negative; a number of samples is at least 0")
        raise UserError(f"{value!r} is not a number of samples; write 2000000 or 2M (K, M, B)")
    whole, part, unit = found.groups()
    exact = Fraction(whole.replace("_", "") + (part or "")) * UNITS[unit.upper()]
    if exact.denominator != 1:
        raise UserError(f"{text} is not a whole number of samples")
    return exact.numerator


def short_count(number: int) -> str:
    """For people to read, three significant digits: 12.8 B, 51.2 M, 512."""
    for unit in ("B", "M", "K"):
        # 999,500 and more would read "1e+03 K"
        if number >= UNITS[unit] * 0.9995:
            return f"{number / UNITS[unit]:.3g} {unit}"
    return str(number)

"""The difference of two configurations of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`stage 2 lr: 0.001 before, 0.002 now`, one for each difference. `stages` is a list of tables."""
    old, new = before["stages"], now["stages"]
    several = max(len(old), len(new)) > 1
    out = []
    for index, (one, other) in enumerate(zip(old, new, strict=False)):
        out += _changed(f"stage {index + 1} " if several else "", one, other)
    if len(old) != len(new):
        out.append(f"{len(old)} stages before, {len(new)} now")
    whole_run = ({key: value for key, value in config.items() if key != "stages"} for config in (before, now))
    return out + _changed("", *whole_run)


def _changed(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{where}{key}: {before.get(key)} before, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]

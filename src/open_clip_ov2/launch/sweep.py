"""A sweep's file -> runs of `ov2 train`: a grid, a list, or both.

name = "keep-ratio"                      # default: the file's name
[base]                                   # flags of every run, by their names
[grid]                                   # every combination
model = ["ov2-vit-b-16", "ov2-vit-s-16"]
keep-ratio = [0.25, 0.5]
[[set]]                                  # more flags for the runs that match
when = { model = "ov2-vit-s-16" }
batch-size = 1024
[[run]]                                  # a run next to the grid
model = "coca_ViT-B-16"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import each, flag_table, from_table, key, read_toml, table

Flags = Mapping[str, Any]
_flags = flag_table(dict.fromkeys(("name", "logs"), "the sweep sets it; leave it out"))


def _grid(value: Any) -> dict[str, Any]:
    flags = _flags(value)
    for name, values in flags.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name}: expected a list of values, got {values!r}")
    return flags


def _set(value: Any) -> tuple[Flags, Flags]:
    rest = table(value)
    if not isinstance(rest.get("when"), dict):
        raise UserError("`when = { FLAG = VALUE }` is missing")
    return _flags(rest.pop("when")), _flags(rest)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.+=-]+", value):
        raise UserError(f"{value!r}: expected letters, digits and ._+=-, as it names a folder")
    return value


@dataclass(frozen=True)
class Sweep:
    """`sets`: (values that a run must have, flags that it then gets)."""

    name: str = key(_name, default="")
    base: Mapping[str, Any] = key(_flags, default=dict)
    grid: Mapping[str, Sequence[Any]] = key(_grid, default=dict)
    sets: tuple[tuple[Flags, Flags], ...] = key(each(_set), default=(), name="set")
    runs: tuple[Flags, ...] = key(each(_flags), default=(), name="run")


@dataclass(frozen=True)
class SweepRun:
    """`varied`: the flags that distinguish it from the others. `own`: these and what [[set]] adds; they win over
    `base`."""

    name: str
    varied: Flags
    base: Flags
    own: Flags


def load_sweep(path: Path) -> Sweep:
    """Raises UserError."""
    sweep = from_table(Sweep, str(path), read_toml(path))
    if not sweep.grid and not sweep.runs:
        raise UserError(f"{path}: nothing to run: add [grid] or [[run]]")
    return sweep if sweep.name else replace(sweep, name=_name(path.stem))


def expand(sweep: Sweep) -> list[SweepRun]:
    """The runs: the grid in its order, with the last key fastest, then the list. Raises UserError."""
    grid = product(*sweep.grid.values()) if sweep.grid else ()
    out, used = [], set[int]()
    for varied in (*(dict(zip(sweep.grid, values, strict=True)) for values in grid), *sweep.runs):
        own = dict(varied)
        for index, (when, more) in enumerate(sweep.sets):
            if all({**sweep.base, **own}.get(name) == value for name, value in when.items()):
                used.add(index)
                own |= more
        base = {name: value for name, value in sweep.base.items() if name not in own}
        out.append(SweepRun(run_name(varied), varied, base, own))
    for index, (when, _) in enumerate(sweep.sets):
        if index not in used:
            wanted = ", ".join(f"{name} = {value}" for name, value in when.items())
            raise UserError(f"[[set]] {index + 1}: no run has {wanted}")
    names = [run.name for run in out]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two runs of the sweep are both {name}; give them different flags")
    return out


def run_name(varied: Flags) -> str:
    """From the varied flags: `ov2-vit-b-16_keep-ratio-0.25`."""
    parts = [short(value) if name == "model" else f"{name}-{short(value)}" for name, value in varied.items()]
    return re.sub(r"[^\w.+=-]+", "-", "_".join(parts))


def short(value: Any) -> str:
    """As text; of a path its last part."""
    if isinstance(value, list):
        return "x".join(map(short, value))
    return str(value).rstrip("/").split("/")[-1]

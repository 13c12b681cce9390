"""A sweep's file -> runs of `ov2 train`: a grid, a list, or both.

name = "keep-ratio"                      # default: the file's name
[base]                                   # flags of every run, by their names
[grid]                                   # every combination
model = ["ov2-vit-b-16", "ov2-vit-s-16"]
keep-ratio = [0.25, 0.5]
[[set]]                                  # more flags for the runs that match
when = { model = "ov2-vit-s-16" }
batch-size = 1024
[[run]]                                  # a run beside the grid
model = "coca_ViT-B-16"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.toml import read_toml

KEYS = ("name", "base", "grid", "set", "run")
OURS = ("name", "logs")  # the sweep names its runs and their place

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """`sets`: (what must match, flags)."""

    name: str
    base: Flags
    grid: Mapping[str, Sequence[Any]]
    sets: tuple[tuple[Flags, Flags], ...]
    runs: tuple[Flags, ...]


@dataclass(frozen=True)
class SweepRun:
    """`varied`: the flags that tell it from the others. `own`: these and what [[set]] adds; they win over `base`."""

    name: str
    varied: Flags
    base: Flags
    own: Flags


def load_sweep(path: Path) -> Sweep:
    """Raises UserError."""
    table = read_toml(path)
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        raise UserError(f"{path}: {unknown[0]}: no such key (there are: {', '.join(KEYS)})")
    base, grid = _flags(table.get("base", {}), f"{path}: [base]"), _flags(table.get("grid", {}), f"{path}: [grid]")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: [grid] {key}: must be a list of values")
    runs = [_flags(run, f"{path}: [[run]] {number}") for number, run in enumerate(_list(table, "run", path), 1)]
    sets = [_set(item, f"{path}: [[set]] {number}") for number, item in enumerate(_list(table, "set", path), 1)]
    if not grid and not runs:
        raise UserError(f"{path}: neither [grid] nor [[run]]: nothing to run")
    name = table.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+=-]+", name):
        raise UserError(f"{path}: name {name!r}: letters, digits and ._+=- alone, as it names a folder")
    return Sweep(name, base, grid, tuple(sets), tuple(runs))


def _list(table: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise UserError(f"{path}: {key}: write it as [[{key}]]")
    return value


def _flags(table: Any, where: str) -> dict[str, Any]:
    """By their names on the command line. Raises UserError."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table of flags")
    flags = {key.replace("_", "-"): value for key, value in table.items()}
    for key, value in flags.items():
        if key in OURS:
            raise UserError(f"{where} {key}: the sweep sets it itself; leave it out")
        if isinstance(value, dict):
            raise UserError(f"{where} {key}: a flag has no table")
    return flags


def _set(table: Any, where: str) -> tuple[Flags, Flags]:
    if not isinstance(table, dict) or not isinstance(table.get("when"), dict):
        raise UserError(f"{where}: `when = {{ FLAG = VALUE }}` is missing")
    rest = {key: value for key, value in table.items() if key != "when"}
    return _flags(table["when"], f"{where} when"), _flags(rest, where)


def expand(sweep: Sweep) -> list[SweepRun]:
    """The grid in its order, the last key fastest; then the list. Raises UserError."""
    varied: list[dict[str, Any]] = []
    if sweep.grid:
        varied += [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    varied += [dict(run) for run in sweep.runs]
    out, used = [], [0] * len(sweep.sets)
    for chosen in varied:
        own = dict(chosen)
        for index, (when, more) in enumerate(sweep.sets):
            if all({**sweep.base, **own}.get(key) == value for key, value in when.items()):
                used[index] += 1
                own |= more
        base = {key: value for key, value in sweep.base.items() if key not in own}
        out.append(SweepRun(run_name(chosen), chosen, base, own))
    if 0 in used:
        wanted = ", ".join(f"{key} = {value}" for key, value in sweep.sets[used.index(0)][0].items())
        raise UserError(f"[[set]] {used.index(0) + 1}: no run has {wanted}")
    names = [run.name for run in out]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two runs of the sweep are {twice}: what varies must tell them apart")
    return out


def run_name(varied: Flags) -> str:
    """From what varies: `ov2-vit-b-16_keep-ratio-0.25`."""
    parts = [short(value) if key == "model" else f"{key}-{short(value)}" for key, value in varied.items()]
    return re.sub(r"[^\w.+=-]+", "-", "_".join(parts))


def short(value: Any) -> str:
    """Of a path its last part is enough."""
    if isinstance(value, list):
        return "x".join(map(short, value))
    return str(value).rstrip("/").split("/")[-1]

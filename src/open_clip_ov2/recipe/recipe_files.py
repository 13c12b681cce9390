"""Recipe files: TOML with `model`, a `[train]` table of flags, and one `[[stage]]` table for each stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.stage import FLAGS, FlagValue, Recipe, Stage
from open_clip_ov2.tables import each, flag_table, from_table, kebab, key, read_toml, table, text

# What [train] cannot contain, and where it belongs.
_ELSEWHERE = {
    **{
        name: f"its flag is called {flag}; or write {name} under [[stage]]"
        for name, flag in FLAGS.items()
        if flag != name
    },
    **dict.fromkeys(
        ("resolution", "samples", "force-image-size", "train-num-samples", "epochs"),
        "every stage has its own; write resolution and samples under [[stage]]",
    ),
    "name": "a stage's name belongs under [[stage]], the run's on the command line (--name)",
    "model": "write it at the top of the file",
    "recipe": "a recipe cannot name another",
    "stage": "write [[stage]]",
}


def _flag_value(value: Any) -> FlagValue:
    items = value if isinstance(value, list) and value else [value]
    for item in items:
        if not isinstance(item, (str, int, float)) or (isinstance(item, float) and not math.isfinite(item)):
            raise UserError(f"{value!r}: expected text, a number, true, false, or a list of them")
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class _File:
    model: str | None = key(text, default=None)
    train: Mapping[str, FlagValue] = key(flag_table(_ELSEWHERE, _flag_value), default=dict)
    stage: tuple[Mapping[str, Any], ...] = key(each(table), default=())


def load_recipe(path: Path | str) -> Recipe:
    """Raises UserError: one line with the file, the stage (counted from 1) and the key."""
    path = Path(path)
    content = read_toml(path)
    for name in content:
        if kebab(name) in FLAGS:
            raise UserError(f"{path}: {name} stands at the top of the file; write it under [[stage]]")
    file = from_table(_File, str(path), content)
    if not file.stage:
        raise UserError(f"{path}: no stage; a recipe has at least one [[stage]] with resolution and samples")
    stages = (from_table(Stage, f"{path}: stage {number}", values) for number, values in enumerate(file.stage, start=1))
    return Recipe(file.model, file.train, tuple(stages), source=path)


def dump_recipe(recipe: Recipe) -> str:
    """TOML text that `load_recipe` reads back as an equal recipe."""
    blocks = [] if recipe.model is None else [f"model = {_toml(recipe.model)}\n"]
    if recipe.flags:
        blocks.append("[train]\n" + _rows(recipe.flags))
    blocks += ["[[stage]]\n" + _rows(stage.items()) for stage in recipe.stages]
    return "\n".join(blocks)


def _rows(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    """Scalars and flat lists are all that a recipe has, so a TOML writer is not worth a dependency."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too; TOML wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)

"""Recipe files: TOML with `model`, a `[train]` table of flags, and one `[[stage]]` table for each stage."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.keys import STAGE_KEYS, kebab, read_stage, stage_items, unknown_key
from open_clip_ov2.recipe.stage import FlagValue, Recipe, Stage
from open_clip_ov2.recipe.toml import read_toml

TOP_KEYS = ("model", "train", "stage")
_BARE_KEY = re.compile(r"[a-z0-9-]+")
# Keys of a stage whose flag has another name: in [train] it goes by the flag's.
_RENAMED = {
    "schedule": "lr-scheduler",
    "weight-decay": "wd",
    "context-length": "force-context-length",
    "crop-scale": "aug-cfg",
}
# Flags that settle the same thing.
_SAME = {**_RENAMED, "base-lr": "lr", "warmup-samples": "warmup"}
_STAGE_ONLY = {
    "resolution": "resolution",
    "force-image-size": "resolution",
    "samples": "samples",
    "train-num-samples": "samples",
    "epochs": "samples",
    "name": "name",
}
_NOT_FLAGS = {"model": "model stands at the top of the file", "recipe": "this is one", "stage": "write [[stage]]"}


def load_recipe(path: Path | str) -> Recipe:
    """Raises UserError: one line with the file, the stage (counted from 1) and the key."""
    path = Path(path)
    return read_recipe(read_toml(path), path)


def read_recipe(content: Mapping[str, Any], path: Path) -> Recipe:
    """A recipe from a parsed file. Raises UserError."""
    for key in content:
        if kebab(key) in STAGE_KEYS:
            raise UserError(f"{path}: {key} stands at the top of the file; it is a stage's, write it under [[stage]]")
        if key not in TOP_KEYS:
            raise unknown_key(str(path), key, TOP_KEYS)
    model = content.get("model")
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise UserError(f"{path}: model: {model!r} is not the name of a model")
    tables = content.get("stage", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: stage: write each stage as a table of its own, [[stage]]")
    if not tables:
        raise UserError(f"{path}: no stage; a recipe has at least one [[stage]] with resolution and samples")
    stages = tuple(read_stage(f"{path}: stage {number}", table.items()) for number, table in enumerate(tables, start=1))
    return Recipe(model, _read_flags(content.get("train", {}), stages, path), stages, source=path)


def _read_flags(table: Any, stages: tuple[Stage, ...], path: Path) -> dict[str, FlagValue]:
    if not isinstance(table, dict):
        raise UserError(f"{path}: train: write the flags of the run as a table, [train]")
    flags: dict[str, FlagValue] = {}
    for written, value in table.items():
        key = kebab(written)
        where = f"{path}: [train] {written if written.isprintable() else repr(written)}"
        if key in flags:
            raise UserError(f"{where}: said twice; leave one out")
        _check_flag(key, where, stages)
        flags[key] = _flag_value(value, where)
    return flags


def _check_flag(key: str, where: str, stages: tuple[Stage, ...]) -> None:
    if not _BARE_KEY.fullmatch(key) or key.startswith("-"):
        raise UserError(f"{where}: not the name of a flag; write it in small letters, without dashes in front")
    if key in _NOT_FLAGS:
        raise UserError(f"{where}: {_NOT_FLAGS[key]}")
    if key in _STAGE_ONLY:
        raise UserError(f"{where}: each stage says its own; write {_STAGE_ONLY[key]} under [[stage]]")
    if key in _RENAMED:
        raise UserError(f"{where}: its flag is called {_RENAMED[key]}; or write {key} under [[stage]]")
    for number, stage in enumerate(stages, start=1):
        for said in stage_items(stage):
            if _SAME.get(said, said) == _SAME.get(key, key):
                raise UserError(
                    f"{where}: stage {number} says {said} too; [train] is for what no stage says, leave one out"
                )


def _flag_value(value: Any, where: str) -> FlagValue:
    if isinstance(value, list):
        if not value or any(isinstance(item, (list, dict)) for item in value):
            raise UserError(f"{where}: a list of texts or numbers is expected, not {value!r}")
        return tuple(_flag_value(item, where) for item in value)  # type: ignore[misc]
    if not isinstance(value, (str, int, float, bool)) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{where}: a text, a number, true, false or a list is expected, not {value!r}")
    return value


def dump_recipe(recipe: Recipe) -> str:
    """TOML text that `load_recipe` reads back as an equal recipe."""
    blocks = [] if recipe.model is None else [f"model = {_toml(recipe.model)}\n"]
    if recipe.flags:
        blocks.append("[train]\n" + _rows(recipe.flags))
    blocks += ["[[stage]]\n" + _rows(stage_items(stage)) for stage in recipe.stages]
    return "\n".join(blocks)


def _rows(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    """Scalars and flat lists are all a recipe has, so a TOML writer is not worth a dependency."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's too; TOML wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return repr(value)

"""Flags that `ov2 submit` and `ov2 sweep` share, made from the fields of ClusterOptions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import flag_type
from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.cluster import OF_EACH_STAGE, ClusterOptions
from open_clip_ov2.tables import keys_of

OPTIONS = keys_of(ClusterOptions)


def add_cluster_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """A flag for each key of the cluster file. None has a default: the file or ClusterOptions gives the value."""
    group = parser.add_argument_group("cluster (defaults: ./ov2-cluster.toml, then ~/.config/ov2/cluster.toml)")
    group.add_argument("--cluster", type=Path, metavar="FILE.toml", help="another cluster file: these flags as keys")
    for name, field in OPTIONS.items():
        if name not in without:
            shown: dict[str, Any] = {"metavar": field.metadata["metavar"], "help": field.metadata["help"]}
            group.add_argument(f"--{name}", dest=field.name, **_reading(field), **shown)


def _reading(field: Field[Any]) -> dict[str, Any]:
    """How argparse reads a flag."""
    read = field.metadata["read"]
    if field.name in OF_EACH_STAGE:
        return {"type": flag_type(lambda text: tuple(read(part) for part in text.split(",")))}
    if field.default_factory is dict:
        return {"type": flag_type(_pair), "action": "append"}
    return {"action": "append"} if field.default == () else {"type": flag_type(read)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{text!r}: expected NAME=VALUE")
    return name, value


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ClusterOptions that were given as flags."""
    values = {field.name: getattr(args, field.name, None) for field in OPTIONS.values()}
    repeated = {field.name: dict if field.default_factory is dict else tuple for field in OPTIONS.values()}
    return {
        name: repeated[name](value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what stands before `--`, what stands after it)."""
    flags = list(argv)
    if "--" not in flags:
        return flags, []
    place = flags.index("--")
    return flags[:place], flags[place + 1 :]

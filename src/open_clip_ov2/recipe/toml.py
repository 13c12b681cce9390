"""TOML files and flags, as every file of ours has them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise UserError(f"{path}: not TOML: {error}") from error


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """argv. True is a flag without a value, false no flag at all."""
    out: list[str] = []
    for key, value in flags.items():
        if value is True:
            out.append(f"--{key}")
        elif isinstance(value, list):
            out += [f"--{key}", *map(str, value)]
        elif value is not False:
            out += [f"--{key}", str(value)]
    return out

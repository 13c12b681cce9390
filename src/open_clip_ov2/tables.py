"""A frozen dataclass from a TOML table or from KEY=VALUE text: types, ranges, the nearest key, and where it stands.

A field says how its value is read: `batch_size: int = key(whole(1), default=64)`. Keys are written in kebab or snake
case; a value may come as TOML has it or as text.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from open_clip_ov2.errors import UserError, naming, unknown_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = TypeVar("Table")
Reader = Callable[[Any], Any]  # raises UserError that says what was expected
_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise UserError(f"{path}: not TOML: {error}") from error


def key(
    read: Reader,
    *,
    default: Any = dataclasses.MISSING,
    name: str | None = None,
    example: str = "",
    flag: str | None = None,
    shown: Any = None,
) -> Any:
    """A field of a dataclass for `from_table`.

    `default` may be a factory (dict); `name` is the key if it is not the field's name; `example` is shown where a
    required key is missing; `flag` is the flag that the key stands for, if it has another name; `shown` makes the key
    a flag itself (`argv.flag`).
    """
    metadata = {"read": read, "name": name, "example": example, "flag": flag, "shown": shown}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def kebab(text: str) -> str:
    return text.strip().replace("_", "-")


def keys_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a dataclass by the key that each is read from, in kebab case."""
    declared = dataclasses.fields(kind)
    return {kebab(field.metadata.get("name") or field.name): field for field in declared if "read" in field.metadata}


def from_table(kind: type[Table], where: str, items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Table:
    """`kind` from keys and values. Raises UserError that begins with `where`."""
    fields, values = keys_of(kind), read_values(kind, where, items)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            example = field.metadata.get("example")
            raise UserError(f"{where}: {name} is missing" + (f", for example {name} = {example}" if example else ""))
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_values(kind: type, where: str, items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Checked values by field name, of the keys that are given. Raises UserError that begins with `where`."""
    if not isinstance(items, Mapping) and not isinstance(items, Iterable):
        raise UserError(f"{where}: expected a table of keys and values, got {items!r}")
    fields, values = keys_of(kind), {}
    for written, value in items.items() if isinstance(items, Mapping) else items:
        field = fields.get(kebab(written))
        if field is None:
            raise unknown_key(where, written, fields)
        if field.name in values:
            raise UserError(f"{where}: {kebab(written)} is given twice; leave one out")
        try:
            values[field.name] = field.metadata["read"](value)
        except UserError as error:
            raise UserError(f"{where}: {kebab(written)}: {error}") from None
    return values


def pairs(where: str, text: str) -> list[tuple[str, str]]:
    """`a=1,b={0,7}` -> [("a", "1"), ("b", "{0,7}")]; commas within braces belong to the value. Raises UserError."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = []
    for item in parts if text.strip() else []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{where}: expected KEY=VALUE, got {item.strip() or 'nothing'!r}")
        found.append((name, value.strip()))
    return found


def whole(least: int, most: int | None = None) -> Reader:
    """An integer >= `least`, and <= `most` if it is given."""
    wanted = f"expected an integer >= {least}" if most is None else f"expected an integer from {least} to {most}"

    def read(value: Any) -> int:
        number: int = _number(int, value, wanted)
        if number < least or (most is not None and number > most):
            raise UserError(f"{number}: {wanted}")
        return number

    return read


def real(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Reader:
    """A finite number in [low, high], without low if it must be `above` that, without high if `below`."""
    limits = f"> {low:g}" if above else f">= {low:g}"
    if not math.isinf(high):
        limits += f" and < {high:g}" if below else f" and <= {high:g}"
    wanted = f"expected a number {limits}"

    def read(value: Any) -> float:
        number: float = _number(float, value, wanted)
        outside = number < low or number > high or (above and number == low) or (below and number == high)
        if outside or not math.isfinite(number):
            raise UserError(f"{value}: {wanted}")
        return number

    return read


def _number(kind: type, value: Any, wanted: str) -> Any:
    try:
        if isinstance(value, bool) or not isinstance(value, (kind, int, str)):
            raise ValueError
        return kind(value)
    except (ValueError, OverflowError):
        raise UserError(f"{value!r}: {wanted}") from None


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{value!r}: expected text")
    return value


def switch(value: Any) -> bool:
    """true or false, or the words for them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    raise UserError(f"{value!r}: expected true or false")


def one_of(*choices: str) -> Reader:
    def read(value: Any) -> str:
        if value not in choices:
            raise UserError(f"{value!r}: expected one of {', '.join(choices)}")
        return str(value)

    return read


def each(read: Reader) -> Reader:
    """A list whose items are all read so."""

    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{value!r}: expected a list")
        return tuple(read(item) for item in value)

    return read_all


def comma_separated(read: Reader) -> Reader:
    """Text such as 84,224, or a list, whose parts are all read so; without repetitions."""

    def read_all(value: Any) -> tuple[Any, ...]:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return tuple(dict.fromkeys(each(read)(parts)))

    return read_all


def table(value: Any) -> dict[str, Any]:
    """A table, with its keys as they are written."""
    if not isinstance(value, dict):
        raise UserError(f"{value!r}: expected a table")
    return dict(value)


def flag_table(refused: Mapping[str, str], read: Reader = lambda value: value) -> Reader:
    """A table of flags of `ov2 train` by name in kebab case, whose values are all read so. `refused`: why a flag cannot
    stand there."""

    def read_all(value: Any) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        for written, item in table(value).items():
            name = kebab(written)
            with naming(name):
                if name in refused:
                    raise UserError(refused[name])
                if name in flags:
                    raise UserError("it is given twice; leave one out")
                if isinstance(item, dict):
                    raise UserError("expected the value of a flag, found a table")
                flags[name] = read(item)
        return flags

    return read_all

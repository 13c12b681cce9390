"""The one reader and writer of a list of flags, as `sys.argv` has it. Of two equal flags the last one counts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import Reader, key, keys_of, switch

REPEATED = ("--stage", "--captions", "--val-captions")  # given once for each of several values


class _Help(argparse.HelpFormatter):
    """The help of a flag ends with its default, unless it speaks of one itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        told = type(default) in (str, int, float) and default not in ("", argparse.SUPPRESS)
        if not told or "default" in text.lower():
            return text
        return f"{text} (default: {f'{default:g}' if isinstance(default, float) else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """A parser of full flag names whose mistakes are UserErrors of one line, not a page of usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _Help, **options})

    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message} (`{self.prog} --help` lists the flags)")


def flag_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of `tables` (or any that raises UserError or ValueError) as the `type` of an argparse flag."""

    def parse(text: str) -> Any:
        try:
            return read(text)
        except (UserError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


class Shown(NamedTuple):
    """How a command line has a key: below which heading of `--help`, and what `add_argument` gets."""

    group: str
    action: dict[str, Any]


def flag(
    metavar: str,
    read: Reader,
    help: str,
    *,
    default: Any = None,
    name: str | None = None,
    repeat: bool = False,
    several: bool = False,
    group: str = "",
) -> Any:
    """A `tables.key` that is a flag of the same name too: `metavar` stands for its value in the help text, `repeat`
    collects the values of several equal flags in a list, `several` those of one flag, and `group` is the heading under
    which `--help` has it. A flag whose default is MISSING must be given. `--help` adds the default to `help`.
    """
    action = {"type": flag_type(read), "metavar": metavar, "help": help, "action": "append" if repeat else "store"}
    action |= {"nargs": "+"} if several else {}
    return key(read, default=default, name=name, shown=Shown(group, action))


def switch_flag(help: str, *, group: str = "") -> Any:
    """A `tables.key` that is a flag without a value too."""
    return key(switch, default=False, shown=Shown(group, {"help": help, "action": "store_true"}))


def _flags_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    return {name: field for name, field in keys_of(kind).items() if field.metadata["shown"]}


def add_flags(parser: Any, kind: type, *, as_text: bool = False) -> None:
    """Add the flags that a dataclass declares to a parser or a group of one. With `as_text` their values stay text, to
    be read together with those of a file, and one that is not given is None."""
    groups = {"": parser}
    for name, field in _flags_of(kind).items():
        group, action = field.metadata["shown"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if as_text:
            more: dict[str, Any] = {"type": None}
        elif field.default is dataclasses.MISSING:
            more = {"required": True}
        else:
            more = {"default": None if action["action"] == "append" else field.default}
        groups[group].add_argument(f"--{name}", **{**action, **more})


def flag_values(kind: type, parsed: argparse.Namespace) -> dict[str, Any]:
    """The parsed values of the flags that a dataclass declares, by field name."""
    return {field.name: getattr(parsed, name.replace("-", "_")) for name, field in _flags_of(kind).items()}


def last(argv: Sequence[str], flag: str) -> int:
    """The index at which a flag stands last, as `--flag VALUE` or `--flag=VALUE`; -1 if it is not given."""
    places = [index for index, word in enumerate(argv) if word == flag or word.startswith(f"{flag}=")]
    return places[-1] if places else -1


def is_given(argv: Sequence[str], flag: str) -> bool:
    """Whether the flag is given, whatever its value."""
    return last(argv, flag) >= 0


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that takes one; None if it is not given."""
    place = last(argv, flag)
    if place < 0:
        return None
    _, equals, value = argv[place].partition("=")
    return value if equals else next(iter(argv[place + 1 : place + 2]), None)


def without(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """argv without these flags, which take one value each."""
    out, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif not any(word.startswith(f"{flag}=") for flag in flags):
            out.append(word)
    return out


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    """argv from values by flag name (without dashes; snake or kebab case): True is a flag without a value, False and
    None leave the flag out, a list or tuple is a flag with several values, or several flags of REPEATED."""
    out: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        written = f"--{name.replace('_', '-')}"
        words = [str(one) for one in values]
        out += [word for one in words for word in (written, one)] if written in REPEATED else [written, *words]
    return out


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what stands before `--`, what stands after it)."""
    flags = list(argv)
    place = flags.index("--") if "--" in flags else len(flags)
    return flags[:place], flags[place + 1 :]

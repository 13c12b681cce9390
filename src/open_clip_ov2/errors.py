"""What can end a run before its time, and how an error is worded. `cli.main` turns each into one line and a status."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

INTERRUPTED_STATUS = 75  # sysexits.h, EX_TEMPFAIL: try again later


class UserError(Exception):
    """Something the user can fix: a flag, a file, a shard, a missing package. Exit status 2.

    The message is one line that says what is wrong, where (flag, file, shard, key), and what to do.
    """


class RunFailed(UserError):
    """A run that cannot continue for a reason of its own, and would fail again: do not requeue it. Exit status 2."""


class InUse(UserError):
    """Another process works in the folder, or has taken it over. Exit status 2; this process writes nothing more."""


class Interrupted(Exception):
    """A signal asked the run to stop; all ranks saved together. The same command resumes it. Exit status 75."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Begin the message of a UserError in the block, of whatever class, with where it arose."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error


@contextlib.contextmanager
def from_extra(extra: str, what: str) -> Iterator[None]:
    """Imports of what an extra of this package brings. Raises UserError, which says that `what` needs it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs {error.name}: pip install 'open_clip_ov2[{extra}]'") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """`; did you mean X?` for the names closest to `name`, or nothing if none is close."""
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in get_close_matches(name.lower(), by_lower, n=count)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unknown_key(where: str, key: str, known: Iterable[str], what: str = "key") -> UserError:
    """The error for a name that is not one of `known`: it says where, names the nearest, and lists them all."""
    known = tuple(known)
    return UserError(f"{where}: unknown {what} {key!r}{nearest(key, known)} (known: {', '.join(known)})")

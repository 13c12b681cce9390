"""What can end a run before its time. `cli.main` turns each into one line and an exit status."""

from __future__ import annotations

INTERRUPTED_STATUS = 75  # sysexits.h, EX_TEMPFAIL: try again later


class UserError(Exception):
    """Something the user can mend: a flag, a file, a shard, a missing package. Exit status 2.

    The message is one line that says what is wrong, where (flag, file, shard, key), and what to do.
    """


class RunFailed(UserError):
    """A run that cannot go on for a reason of its own, and would fail again: do not requeue it. Exit status 2."""


class Interrupted(Exception):
    """A signal asked the run to stop; all ranks saved together. The same command goes on. Exit status 75."""

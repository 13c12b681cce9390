"""The one exception that a user can cause."""


class UserError(Exception):
    """Something the user can mend: a flag, a file, a shard, a missing package.

    The message is one line that says what is wrong, where (flag, file, shard, key), and what to do.
    `ov2` prints it without a traceback and exits with status 2.
    """

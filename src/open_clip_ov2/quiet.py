"""The one way to silence a library that reports what is meant, such as OpenCLIP about a model without weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, prints: bool = False) -> Iterator[None]:
    """Drop log records below ERROR and Python warnings, of every library; with `prints`, what goes to stdout too.

    This is state of the whole process, so only the main thread should use it.
    """
    before = logging.root.manager.disable
    stdout = contextlib.redirect_stdout(io.StringIO()) if prints else contextlib.nullcontext()
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), stdout:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

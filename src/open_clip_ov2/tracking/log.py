"""The log of a run: everything in RUN/out.log, and what matters on the terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

PACKAGE = "open_clip_ov2"
LOG = "out.log"
FILE_ONLY = "file_only"  # logger.info(..., extra={FILE_ONLY: True}): keep it from the terminal


class _ConsoleHandler(logging.Handler):
    """Short lines, printed through the console that shows the progress line, so that the two do not mix."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.addFilter(_matters)

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def _matters(record: logging.LogRecord) -> bool:
    """Our own lines and all warnings; OpenCLIP's page of parameters and model listing are for the file."""
    if getattr(record, FILE_ONLY, False) or record.getMessage().startswith("No pretrained weights loaded"):
        return False  # expected: training starts from random weights
    return record.name.split(".")[0] == PACKAGE or record.levelno >= logging.WARNING


def setup_logging(file: Path | None, rank: int, console: Console | None, debug: bool = False) -> ExitStack:
    """Log to a file and the console, where given; ranks other than 0 print warnings to stderr after their rank. The
    root logger's own handlers (which would print every line twice) come back with `close`."""
    root, handlers = logging.getLogger(), []
    before, level = root.handlers[:], root.level

    def add(handler: logging.Handler, line: str, date: str | None = None, least: int = logging.NOTSET) -> None:
        handler.setFormatter(logging.Formatter(line, date))
        handler.setLevel(least)
        handlers.append(handler)

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        add(
            logging.FileHandler(file, encoding="utf-8", errors="backslashreplace"),
            "%(asctime)s | %(levelname)s | %(message)s",
            "%Y-%m-%d,%H:%M:%S",
        )
    if console is not None:
        add(_ConsoleHandler(console), "%(asctime)s %(message)s", "%H:%M:%S")
    if rank != 0:
        add(logging.StreamHandler(sys.stderr), f"rank {rank}: %(message)s", least=logging.WARNING)

    def use(handlers: list[logging.Handler], level: int, warnings: bool) -> None:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(warnings)

    use(handlers, logging.DEBUG if debug else logging.INFO, True)
    undo = ExitStack()
    undo.callback(use, before, level, False)
    for handler in handlers:
        undo.callback(handler.close)
    return undo

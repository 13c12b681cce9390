"""The log of a run: everything in RUN/out.log, and what matters on the terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console

PACKAGE = "open_clip_ov2"
FILE_ONLY = "file_only"  # logger.info(..., extra={FILE_ONLY: True}): keep it from the terminal


class _ConsoleHandler(logging.Handler):
    """Short lines, printed through the console that shows the progress line, so that the two do not mix."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def _matters(record: logging.LogRecord) -> bool:
    """Our own lines and all warnings; OpenCLIP's page of parameters and model listing are for the file."""
    if getattr(record, FILE_ONLY, False) or record.getMessage().startswith("No pretrained weights loaded"):
        return False  # expected: training starts from random weights
    return record.name.split(".")[0] == PACKAGE or record.levelno >= logging.WARNING


class RunLog:
    """The handlers of one run, in place of those that the root logger had; `close` restores them."""

    def __init__(self, handlers: list[logging.Handler], level: int) -> None:
        self._handlers = handlers
        self._root = logging.getLogger()
        self._level_before = self._root.level
        self._others = self._root.handlers[:]
        for handler in self._others:  # of some basicConfig, which would print every line twice
            self._root.removeHandler(handler)
        self._root.setLevel(level)
        for handler in handlers:
            self._root.addHandler(handler)
        logging.captureWarnings(True)

    def close(self) -> None:
        for handler in self._handlers:
            self._root.removeHandler(handler)
            handler.close()
        for handler in self._others:
            self._root.addHandler(handler)
        self._root.setLevel(self._level_before)
        logging.captureWarnings(False)


def setup_logging(run_dir: Path | None, rank: int, console: Console | None, debug: bool = False) -> RunLog:
    """Rank 0 logs to RUN/out.log and the console; other ranks print warnings to stderr after their rank."""
    level = logging.DEBUG if debug else logging.INFO
    handlers: list[logging.Handler] = []
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(run_dir / "out.log")
        to_file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"))
        handlers.append(to_file)
    if console is not None:
        to_console = _ConsoleHandler(console)
        to_console.addFilter(_matters)
        handlers.append(to_console)
    if rank != 0:
        to_stderr = logging.StreamHandler(sys.stderr)
        to_stderr.setLevel(logging.WARNING)
        to_stderr.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        handlers.append(to_stderr)
    return RunLog(handlers, level)

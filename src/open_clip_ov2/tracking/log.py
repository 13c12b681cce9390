"""The run's log: all of it in out.log, what matters on the terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console

PACKAGE = "open_clip_ov2"
FILE_ONLY = "file_only"  # logger.info(..., extra={FILE_ONLY: True}): not for the terminal


class _ConsoleHandler(logging.Handler):
    """Short lines through the console that the progress line lives on."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def _matters(record: logging.LogRecord) -> bool:
    """OpenCLIP logs a page of parameters and the whole model; that belongs in the file."""
    if getattr(record, FILE_ONLY, False) or record.getMessage().startswith("No pretrained weights loaded"):
        return False  # a model that starts from nothing is what training is for
    return record.name.split(".")[0] == PACKAGE or record.levelno >= logging.WARNING


class RunLog:
    """The handlers of one run; `close` takes them away again."""

    def __init__(self, handlers: list[logging.Handler], level: int) -> None:
        self._handlers = handlers
        self._root = logging.getLogger()
        self._level_before = self._root.level
        self._others = self._root.handlers[:]
        for handler in self._others:  # somebody's basicConfig would print every line a second time
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
    """Rank 0: RUN/out.log and the console. Other ranks: warnings to stderr, with the rank before them."""
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

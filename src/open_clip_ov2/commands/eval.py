"""`ov2 eval`: what a model can do on held-out data. Under torchrun on several processes, with the same result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, add_flags
from open_clip_ov2.commands.options import add_device
from open_clip_ov2.evaluate.options import EvalOptions
from open_clip_ov2.tracking.text_table import on_console

Result = Mapping[str, Any]


def main(argv: Sequence[str]) -> None:
    flags = vars(_parser().parse_args(argv))
    model, device = flags.pop("run"), flags.pop("device")
    out = flags.pop("out") or _beside(model)
    console = Console()
    show_result = partial(show, console=console)  # called in the first process alone
    training.evaluate(model, device=device, out=out, say=partial(print, file=sys.stderr), done=show_result, **flags)


def _parser() -> Parser:
    parser = Parser(
        prog="ov2 eval", description="Evaluate a model on held-out data; docs/evaluation.md defines each task."
    )
    parser.add_argument(
        "run", metavar="MODEL", help="a run, a .pt of it, a model folder, hf-hub:, NAME:WEIGHTS, or pixels:16"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval.json in the run, or here")
    add_device(parser)
    add_flags(parser, EvalOptions)
    return parser


def _beside(source: str) -> Path:
    path = Path(source)
    folder = path if path.is_dir() else path.parent.parent if path.is_file() else Path()
    return folder / "eval.json"


def show(name: str, results: Mapping[str, Result], console: Console) -> None:
    """A task's line, what it could not use, and its table if it has one."""
    from open_clip_ov2.evaluate.tasks import TASKS

    task, found = TASKS[name], results[name]
    console.print(f"[bold]{name:<20}[/] {escape(task.line(found, results))}", highlight=False)
    skipped = [text for key in ("skipped", "skipped_samples") for text in _causes(found.get(key) or {})]
    if skipped:
        console.print(f"{'':<20} not counted: {escape(', '.join(skipped))}", highlight=False)
    rows = task.table(found) if task.table else []
    if rows:
        console.print(on_console([list(rows[0]), *(list(row.values()) for row in rows)]))


def _causes(skipped: Any) -> list[str]:
    """`3 empty caption`, from keys by cause, maybe below train and test, or from a list of skipped samples."""
    if isinstance(skipped, Mapping):
        counts = [f"{len(keys)} {cause}" for cause, keys in skipped.items() if isinstance(keys, list) and keys]
        nested = [part for part in skipped.values() if isinstance(part, Mapping)]
        return counts + [text for part in nested for text in _causes(part)]
    return [f"{len(skipped)}, the first: {skipped[0]['key']} ({skipped[0]['cause']})"]

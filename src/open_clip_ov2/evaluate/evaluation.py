"""An evaluation: its tasks one after the other, and the file of their results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.gathering import place
from open_clip_ov2.evaluate.tasks import TASKS, check_tasks
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES, outcomes_file, write_outcomes
from open_clip_ov2.files import read_json, write_json

CONSTANTS = ("temperature", "regulariser", "num_samples")  # floats of a result that measure nothing


def run_tasks(
    job: EvalJob,
    *,
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
    done: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Results by task. After each, the first process writes all results so far to `out`, what came out for each picture
    to a file .npz beside it (text/outcomes.py), and calls `done` with the task's name and the results. If no tasks are
    named, `say` gets a line for each that is left out. Raises UserError if a task that was named cannot be done, before
    the first task as far as that can be known."""
    model, options, first = job.model, job.options, place()[0] == 0
    check_tasks(options, model.name, model.abilities)
    results: dict[str, Any] = {}
    outcomes: dict[str, Any] = {}
    for name in options.tasks or [name for name, task in TASKS.items() if not task.named_only]:
        obstacle = TASKS[name].obstacle(model.name, model.abilities, options)
        try:
            if obstacle:
                raise UserError(obstacle)
            found = TASKS[name].compute(job)
        except UserError as error:  # of the data, which are the same on all ranks
            if options.tasks:
                raise
            if say and first:
                say(f"{name}: left out, {error}")
            continue
        outcomes[name] = found.pop(OUTCOMES, {})
        results[name] = found
        if out is not None and first:
            _write(out, {"checkpoint": str(model.checkpoint), "data": options.data}, results, outcomes)
        if done and first:
            done(name, results)
    if not results:
        raise UserError(f"no task can be done on {model.name}; name one with --tasks to see why")
    return results


def headlines(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`task/metric` -> number, of the floats at the top of each result."""
    return {
        f"{task}/{name}": float(value)
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, float) and name not in CONSTANTS
    }


def check_writable(path: Path) -> None:
    """Check, before hours of work, that the file can be written. Raises UserError."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path}: cannot be written; name a file in a folder that exists and is yours (--out)")


def _write(path: Path, about: dict[str, str], results: Mapping[str, Any], outcomes: Mapping[str, Any]) -> None:
    """The results of other tasks on the same model and data stay in the file, not what came out for each picture."""
    before: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        before = read_json(path, dict)
    if any(before.get(key) != value for key, value in about.items()):
        before = {}
    try:
        write_outcomes(outcomes_file(path), outcomes)
        write_json(path, {**before, **about, **results})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error

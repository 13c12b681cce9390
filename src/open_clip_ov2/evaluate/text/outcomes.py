"""What came out for each picture, beside the mean that a task reports: for intervals and for comparing two models.

A task's result has them under OUTCOMES, by the dotted name of the metric whose value is their mean. They go to a file
`.npz` beside the results: `TASK.METRIC`, float32, and `TASK.METRIC.keys`, the samples' keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import written_whole

OUTCOMES, KEYS = "outcomes", ".keys"


def outcome(keys: Sequence[str], values: Sequence[float]) -> dict[str, list[Any]]:
    """One metric's in the order of the keys, JSON-ready."""
    pairs = sorted(zip(keys, values, strict=True), key=lambda pair: pair[0])
    return {"keys": [key for key, _ in pairs], "values": [float(value) for _, value in pairs]}


def outcomes_file(results: Path) -> Path:
    return results.with_suffix(".npz")


def write_outcomes(path: Path, by_task: Mapping[str, Mapping[str, Any]]) -> None:
    """Those of each task by metric. Raises OSError."""
    arrays = {}
    for task, metrics in by_task.items():
        for metric, one in metrics.items():
            arrays[f"{task}.{metric}"] = np.asarray(one["values"], dtype=np.float32)
            arrays[f"{task}.{metric}{KEYS}"] = np.asarray(one["keys"], dtype=np.str_)
    with written_whole(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_outcomes(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(keys, float64 values) by `TASK.METRIC`; nothing if there is no such file. Raises UserError."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if not name.endswith(KEYS)]
            return {name: (file[name + KEYS], file[name].astype(np.float64)) for name in names}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: not outcomes of `ov2 eval` ({first_line(error)}); evaluate again") from error

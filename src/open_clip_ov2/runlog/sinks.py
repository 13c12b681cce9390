"""Where figures are written: results.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """One line a record, written whole and flushed, so that a killed run leaves a readable file."""

    def __init__(self, path: Path, stage: str = "") -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._stage = stage

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        record: dict[str, Any] = {"kind": kind, "samples_seen": samples_seen, "time": time.time()}
        if self._stage:
            record["stage"] = self._stage
        record |= {key: _finite(value) for key, value in row.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars, pictures and text over samples seen."""

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder), flush_secs=30)

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, samples_seen)
        if kind == "val":
            self._writer.flush()

    def image(self, name: str, image: Image.Image, samples_seen: int) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), samples_seen, dataformats="HWC")

    def text(self, name: str, markdown: str, samples_seen: int) -> None:
        self._writer.add_text(name, markdown, samples_seen)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """In this run's own file: SummaryWriter.add_hparams would make a second run of it."""
        plain = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()
        }
        names = {f"hparam/{name}": value for name, value in metrics.items()}
        for summary in hparams_summary(plain, names):
            self._writer._get_file_writer().add_summary(summary)
        for name, value in names.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        self._writer.close()

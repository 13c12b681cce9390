"""Where figures are written: results.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary

logger = logging.getLogger(__name__)


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """One line a record, written whole and flushed, so that a killed run leaves a readable file.

    A full disk costs no line: what could not be written waits for the next one. `resumed_at`: records after so many
    samples are dropped, because the run sees them again.
    """

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        if resumed_at is not None and path.is_file():
            _keep_until(path, resumed_at)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._waiting = ""
        self._stage = 1

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        self._stage = number

    def write(self, kind: str, samples_seen: int, scalars: Mapping[str, float], row: Mapping[str, Any]) -> None:
        record: dict[str, Any] = {"kind": kind, "samples_seen": samples_seen, "stage": self._stage, "time": time.time()}
        record |= {key: _finite(value) for key, value in row.items()}
        self._waiting += json.dumps(record, allow_nan=False) + "\n"
        try:
            # Unbuffered, so that after a failure what was written is known.
            written = os.write(self._file.fileno(), self._waiting.encode())
        except OSError as error:
            logger.warning("results.jsonl: %s; its lines are kept until there is room", error)
        else:
            self._waiting = self._waiting.encode()[written:].decode()

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, samples_seen: int) -> None:
    """The file without the records of later samples, and without a torn last line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and record["samples_seen"] <= samples_seen:
            kept.append(line)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


class TensorBoard:
    """Scalars, pictures and text over samples seen. After a resume TensorBoard hides what is seen again."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), flush_secs=30, purge_step=purge)

    def begin_stage(self, number: int, title: str, samples_seen: int) -> None:
        if title:
            self._writer.add_text("run/stage", f"stage {number}: {title}", samples_seen)

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

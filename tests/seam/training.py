"""What several tests of `ov2 train` share: flags of a run of seconds, its records, real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

NANO = ["--model", "ov2-vit-nano-8", "--force-image-size", "24", "--force-context-length", "12"]
TIMING = {"time", "images_per_second", "tokens_per_second", "data_wait_share", "memory_mb", "epoch_skips"}


def data_flags(squares: Path, samples: int = 32) -> list[str]:
    return [
        "--train-data", f"{squares}/train/{{00000..00003}}.tar", "--train-num-samples", str(samples),
        "--val-data", f"{squares}/val/00000.tar", "--workers", "0", "--batch-size", "8", "--lr", "1e-3",
        "--warmup", "1", "--epochs", "1", "--log-every-n-steps", "2",
    ]  # fmt: skip


def results(run: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def figures(run: Path) -> list[dict[str, Any]]:
    """All records without what depends on the clock."""
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def start(flags: list[str], processes: int, **environment: str) -> list[subprocess.Popen[str]]:
    """`ov2 train` as so many ranks on this machine, as torchrun starts them but without its own process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **environment}
    if processes > 1:
        shared["WORLD_SIZE"] = str(processes)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "open_clip_ov2", "train", *flags],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else shared,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 180) -> list[tuple[int, str]]:
    """(exit status, stderr) of each rank."""
    errors = [process.communicate(timeout=timeout_s)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]

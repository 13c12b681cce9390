"""What several tests of `ov2 train` share: flags of a run of seconds, its records, real processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# An ov2 model of width 32 with two blocks: runs of it are the same code in a tenth of the time.
TINY_MODEL = f"local-dir:{Path(__file__).parent / 'old_run' / 'tiny'}"
TINY = ["--model", TINY_MODEL, "--force-image-size", "24", "--force-context-length", "12"]
NANO = ["--model", "ov2-vit-nano-8", "--force-image-size", "24", "--force-context-length", "12"]
TIMING = {"time", "images_per_second", "tokens_per_second", "data_wait_share", "memory_mb", "utilisation", "mfu"}


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


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["open_clip_ov2.openclip.run.runner", "training"])  # seconds of imports, once


class Rank:
    """One process of a run: a real one, forked from a server that has the imports done."""

    def __init__(self, work: Callable[..., int], args: Sequence[Any], environment: dict[str, str]) -> None:
        """`work` is a module's function; what it returns is the exit status."""
        self._errors = Path(tempfile.mkstemp(prefix="rank-", suffix=".err")[1])
        self._process = _SERVER.Process(target=_run_rank, args=(work, tuple(args), environment, str(self._errors)))
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """(exit status, stderr)."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"rank still runs after {timeout_s:g} s: {self._errors.read_text()[-2000:]}")
        return self._process.exitcode, self._errors.read_text()


def _run_rank(work: Callable[..., int], args: tuple[Any, ...], environment: dict[str, str], errors: str) -> None:
    os.setsid()
    with open(os.devnull, "w") as nothing, open(errors, "w") as file:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # what a process has that comes from no server
    status = work(*args)
    sys.stderr.flush()
    sys.exit(status)


def _train(*flags: str) -> int:
    from open_clip_ov2.cli import main

    return main(["train", *flags])


def start(flags: Sequence[str], processes: int) -> list[Rank]:
    """`ov2 train` as so many ranks on this machine."""
    return start_ranks(_train, flags, processes)


def start_ranks(work: Callable[..., int], args: Sequence[Any], processes: int) -> list[Rank]:
    """As torchrun starts them, but without its own process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Rank(work, args, {**shared, **one} if processes > 1 else {}) for one in own]


def finish(ranks: list[Rank], timeout_s: float = 180) -> list[tuple[int, str]]:
    """(exit status, stderr) of each rank."""
    return [rank.finish(timeout_s) for rank in ranks]


def wait_for(condition: Callable[[], bool], processes: Sequence[Rank], timeout_s: float = 120) -> bool:
    """Poll fast until it holds; False if a process ended before."""
    begin = time.monotonic()
    while not condition():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() - begin < timeout_s, "nothing happened"
        time.sleep(0.001)
    return True


def samples_of(run: Path) -> int:
    """The last step logged; a line that is being written does not count."""
    try:
        return max((row["samples_seen"] for row in results(run, "train")), default=0)
    except (OSError, ValueError):
        return 0


class Killer:
    """SIGKILL to one of two ranks, by chance, after a random number of steps; every other time while a checkpoint is
    being written. After `limit` kills a run is left alone.

    Every fifth time the rank's data workers live on, as when memory runs out. They hold its sockets open until they
    notice after 5 s, and only then does the other rank; all other times they are killed with it, as SLURM does it.
    """

    def __init__(self, run: Path, limit: int, seed: int) -> None:
        self._run, self._limit, self._rng = run, limit, random.Random(seed)
        self.kills = self.while_writing = 0

    def start_and_kill(self, flags: list[str]) -> None:
        target = samples_of(self._run) + self._rng.choice((8, 16, 24))
        ranks = start(flags, 2)
        if self.kills == self._limit:
            done = finish(ranks, timeout_s=600)
            assert [status for status, _ in done] == [0, 0], done
            return
        going = wait_for(lambda: samples_of(self._run) >= target, ranks)
        if going and self.kills % 2:
            self.while_writing += wait_for(lambda: any((self._run / "checkpoints").glob(".tmp-*")), ranks)
        time.sleep(self._rng.random() * 0.05)
        rank = ranks[self._rng.randrange(2)]
        if self.kills % 5:
            os.killpg(os.getpgid(rank.pid), signal.SIGKILL)
        else:
            rank.send_signal(signal.SIGKILL)
        self.kills += 1
        for rank in ranks:  # the other one notices, and ends by itself
            rank.finish(timeout_s=60)

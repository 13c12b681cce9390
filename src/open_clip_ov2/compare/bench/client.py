"""The other side of worker.py."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import Any

from open_clip_ov2.compare.bench.cases import Job
from open_clip_ov2.errors import RunFailed, UserError

END_S = 10.0  # a worker that has been told to end does so at once; after this it is killed


class OutOfMemory(Exception):
    """The contender did not fit. Its process has ended."""


class Client:
    """A contender's process. Raises UserError for a model that cannot be built, OutOfMemory, RunFailed."""

    def __init__(self, job: Job) -> None:
        """Begins; `wait` for it."""
        self.job = job
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "open_clip_ov2.compare.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._about: dict[str, Any] | None = None
        self._send(asdict(job))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def about(self) -> dict[str, Any]:
        self.wait()
        assert self._about is not None
        return self._about

    def wait(self) -> None:
        """Until the model is there."""
        if self._about is None:
            self._about = self._reply()

    def ask(self, *question: Any) -> dict[str, Any]:
        self.wait()
        self._send(question)
        return self._reply()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its reply says why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = self._process.stdout.readline()
        except BaseException:
            self.close()
            raise
        reply = json.loads(line) if line else {}
        if line and not ({"error", "out_of_memory"} & set(reply)):
            return reply
        told = self._last_words()
        status = self.close()
        if "error" in reply:
            raise UserError(reply["error"])
        if "out_of_memory" in reply or status == -signal.SIGKILL:  # Linux ends what takes too much by KILL
            raise OutOfMemory
        raise RunFailed(f"{self.job.arm} ({self.job.model}) failed with status {status}: {told}")

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        return "\n".join(self._errors.read().strip().splitlines()[-1:]) or "it said nothing"

    def close(self) -> int:
        """The exit status."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            status = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
        return status

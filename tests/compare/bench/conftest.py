from __future__ import annotations

import multiprocessing

import pytest

from open_clip_ov2.compare.bench import turns

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["open_clip_ov2.openclip.run.bench_model"])  # seconds of imports, once


@pytest.fixture(autouse=True)
def processes_with_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variant's process comes from a server that has the imports done, as in scripts/bench_gpu.sh."""
    monkeypatch.setattr(turns, "CONTEXT", SERVER)

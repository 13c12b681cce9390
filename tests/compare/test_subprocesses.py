"""Commands side by side, and images/s from a run's records. Oracles are named at each test."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from open_clip_ov2.compare.measuring import rate_of
from open_clip_ov2.compare.subprocesses import Command, run_all
from open_clip_ov2.errors import UserError


def job(folder: Path, name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-S", "-c", code), folder / f"{name}.txt")


def test_side_by_side(tmp_path: Path) -> None:
    """Oracle: each command counts the others' marks; two at once see two, and never three."""
    code = (
        f"import pathlib, time, os; f = pathlib.Path({str(tmp_path)!r}); m = f / ('at-' + str(os.getpid())); m.touch();"
        "end = time.time() + 0.5\nseen = 0\n"
        "while time.time() < end: seen = max(seen, len(list(f.glob('at-*')))); time.sleep(0.01)\n"
        "m.unlink(); print(seen, os.environ['OMP_NUM_THREADS'])"
    )
    jobs = [job(tmp_path, name, code) for name in "abcd"]
    finished = [one.title for one, _ in run_all(jobs, 2, threads=3)]
    assert sorted(finished) == list("abcd")
    seen_by_jobs = [one.log.read_text().split() for one in jobs]
    assert max(int(seen) for seen, _ in seen_by_jobs) == 2
    assert {threads for _, threads in seen_by_jobs} == {"3"}


def test_a_failure_is_told_and_stops_the_others(tmp_path: Path) -> None:
    """Oracle: the other's own handler, which runs when it is asked to stop."""
    patient = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)));"
        "print('up', flush=True); [time.sleep(0.05) for _ in range(1200)]"
    )
    other = job(tmp_path, "other", patient)
    wait = f"import time\nwhile 'up' not in open({str(other.log)!r}).read(): time.sleep(0.01)\n"
    failing = job(tmp_path, "one", wait + "print('ov2: error: no such shard'); raise SystemExit(2)")
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"^one: no such shard \(exit status 2; its output: .*one.txt\)$"):
        list(run_all([other, failing], 2))
    assert time.monotonic() - begun < 30
    assert other.log.read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_rate() -> None:
    """Oracle: by hand. Warm-up, before the second record, does not count."""
    rows = [{"samples_seen": s, "time": t} for s, t in ((32, 9.0), (320, 20.0), (640, 21.0), (960, 22.0))]
    assert rate_of(rows) == 320


def test_a_scheduler_ends_the_runs_too(tmp_path: Path) -> None:
    """Oracle: the run's own handler. TERM to the one who waits for it."""
    patient = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)));"
        "print('up', flush=True); os.kill(os.getppid(), signal.SIGTERM); [time.sleep(0.05) for _ in range(1200)]"
    )
    one = job(tmp_path, "one", patient)
    with pytest.raises(SystemExit) as ended:
        list(run_all([one], 1))
    assert ended.value.code == 128 + signal.SIGTERM
    assert one.log.read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

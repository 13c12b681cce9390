"""Commands side by side, and images/s from a run's records. Oracles are named at each test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from open_clip_ov2.compare.measuring import rate_of
from open_clip_ov2.compare.subprocesses import Command, run_all
from open_clip_ov2.errors import UserError

Job = Callable[[str, str], Command]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A command of some code of one's own: a module on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, code: str) -> Command:
        (tmp_path / f"job_{name}.py").write_text(code)
        return Command(name, f"job_{name}", ("--flag", name), tmp_path / f"{name}.txt")

    return make


def test_side_by_side(job: Job, tmp_path: Path) -> None:
    """Oracle: each command counts the others' marks; two at once see two, and never three."""
    code = (
        f"import pathlib, time, os; f = pathlib.Path({str(tmp_path)!r}); m = f / ('at-' + str(os.getpid())); m.touch();"
        "end = time.time() + 0.5\nseen = 0\n"
        "while time.time() < end: seen = max(seen, len(list(f.glob('at-*')))); time.sleep(0.01)\n"
        "m.unlink(); print(seen, os.environ['OMP_NUM_THREADS'])"
    )
    jobs = [job(name, code) for name in "abcd"]
    finished = [one.title for one, _ in run_all(jobs, 2, threads=3)]
    assert sorted(finished) == list("abcd")
    seen_by_jobs = [one.log.read_text().split() for one in jobs]
    assert max(int(seen) for seen, _ in seen_by_jobs) == 2
    assert {threads for _, threads in seen_by_jobs} == {"3"}


def test_as_a_new_process(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `python -m`, with the same environment and folder."""
    code = (
        "import atexit, multiprocessing, os, sys\natexit.register(print, 'the end')\n"
        "print(multiprocessing.get_start_method())\n"
        "print(__name__, sys.argv[1:], os.getcwd(), os.environ['NEW'], repr(sys.stdin.read()), os.isatty(1))\n"
        "print('on stderr', file=sys.stderr)\nsys.exit(3)"
    )
    begun_before = job("first", "")  # the server runs already when folder and environment change
    list(run_all([begun_before], 1))
    monkeypatch.setenv("NEW", "here")
    monkeypatch.chdir(tmp_path)
    one = job("one", code)
    with pytest.raises(UserError, match="exit status 3"):
        list(run_all([one], 1, threads=1))
    plain = subprocess.run(
        [sys.executable, "-m", one.module, *one.argv],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert plain.returncode == 3
    assert sorted(one.log.read_text().splitlines()) == sorted((plain.stdout + plain.stderr).splitlines())


def test_the_server_touches_no_device() -> None:
    """Oracle: torch's own doors to CUDA, watched in a new process; a fork would find CUDA broken otherwise."""
    code = (
        "import torch, sys\n"
        "def forbidden(*_): sys.exit('touched')\n"
        "torch._C._cuda_getDeviceCount = torch._C._cuda_init = forbidden\n"
        "import open_clip_ov2.compare.subprocesses\n"
        "print('untouched'); torch.cuda.is_available()"
    )
    watched = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (watched.stdout, watched.stderr) == ("untouched\n", "touched\n")


def test_a_failure_is_told_and_stops_the_others(job: Job) -> None:
    """Oracle: the other's own handler, which runs when it is asked to stop."""
    patient = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)));"
        "print('up', flush=True); [time.sleep(0.05) for _ in range(1200)]"
    )
    other = job("other", patient)
    wait = f"import time\nwhile 'up' not in open({str(other.log)!r}).read(): time.sleep(0.01)\n"
    failing = job("one", wait + "print('ov2: error: no such shard'); raise SystemExit(2)")
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


def test_a_scheduler_ends_the_runs_too(job: Job) -> None:
    """Oracle: the run's own handler. TERM to the one who waits for it."""
    patient = (
        "import multiprocessing, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
        "print('up', flush=True); os.kill(multiprocessing.parent_process().pid, signal.SIGTERM)\n"
        "[time.sleep(0.05) for _ in range(1200)]"
    )
    one = job("one", patient)
    with pytest.raises(SystemExit) as ended:
        list(run_all([one], 1))
    assert ended.value.code == 128 + signal.SIGTERM
    assert one.log.read_text().split() == ["up", "saved"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_to_the_whole_group_waits_for_the_runs(job: Job, tmp_path: Path) -> None:
    """Oracle: the run's own handler, which needs five seconds. `timeout` and schedulers send TERM to all processes."""
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), print('saved'), sys.exit(75)))\n"
        "print('up', flush=True)\n"
        "[time.sleep(0.05) for _ in range(1200)]"
    )
    one = job("one", slow)
    waiting = (
        "from pathlib import Path; from open_clip_ov2.compare.subprocesses import Command, run_all\n"
        f"list(run_all([Command('one', {one.module!r}, (), Path({str(one.log)!r}))], 1))"
    )
    parent = subprocess.Popen([sys.executable, "-c", waiting], cwd=tmp_path, start_new_session=True)
    while parent.poll() is None and not (one.log.is_file() and "up" in one.log.read_text()):
        time.sleep(0.05)
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.wait(60) == 128 + signal.SIGTERM
    assert one.log.read_text().split() == ["up", "saved"]

"""Signals as flags, agreement among ranks, and random states. Oracles: real signals, real processes, equal draws."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "openclip"))
from training import finish, start_ranks

from open_clip_ov2.train.random_state import get_random_state, set_random_state
from open_clip_ov2.train.signals import Agreement, StopSignals

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_sets_a_flag_and_nothing_else(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.name is None
        os.kill(os.getpid(), number)
        assert signals.name == name
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_forked_child_does_not_run_the_handler() -> None:
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:  # pragma: no cover
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(7 if signals.name is None else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_random_states_come_back(tmp_path: Path) -> None:
    """Oracle: the draws that followed; the state survives a file that holds no pickle."""

    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    random.gauss(0, 1)  # half of a pair is kept for later
    np.random.standard_normal()
    torch.save(get_random_state(CPU), tmp_path / "state.pt")
    expected = [draws() for _ in range(3)], random.gauss(0, 1), np.random.standard_normal()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert ([draws() for _ in range(3)], random.gauss(0, 1), np.random.standard_normal()) == expected


def _agree() -> int:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    agreement = Agreement(2, CPU, flags=2)
    seen = [agreement.exchange([int(rank == 1 and step == 2), int(rank == 0 and step == 3)]) for step in range(6)]
    agreement.close()
    assert seen == [[0, 0], [0, 0], [0, 0], [1, 0], [0, 1], [0, 0]], seen
    assert [agreement.now(rank == 0), agreement.now(False)] == [True, False]
    torch.distributed.destroy_process_group()
    return 0


def test_ranks_agree_one_step_late() -> None:
    done = finish(start_ranks(_agree, [], 2))
    assert [status for status, _ in done] == [0, 0], done
    assert Agreement(1, CPU, flags=2).exchange([1, 0]) == [1, 0]

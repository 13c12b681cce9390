"""A validation that a signal cuts short. Oracle: the batches taken, counted."""

from __future__ import annotations

import os
import signal

from open_clip_ov2.openclip.run.stage_progress import UntilSignal
from open_clip_ov2.train.signals import StopSignals


class Batches(list[int]):
    num_samples = 5


def test_the_batch_at_hand_is_the_last() -> None:
    """A real signal to this process."""
    with StopSignals() as signals:
        whole = UntilSignal(Batches(range(5)), signals)
        assert list(whole) == [0, 1, 2, 3, 4]
        assert not whole.stopped
        assert whole.num_samples == 5
        cut, taken = UntilSignal(Batches(range(5)), signals), []
        for batch in cut:
            taken.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [0, 1]
        assert cut.stopped

"""A validation that a signal cuts short. Oracle: the batches taken, counted."""

from __future__ import annotations

import os
import signal

from open_clip_ov2.openclip.run.validation import until_signal
from open_clip_ov2.train.signals import StopSignals


def test_the_batch_at_hand_is_the_last() -> None:
    """A real signal to this process."""
    with StopSignals() as signals:
        assert list(until_signal(range(5), signals)) == [0, 1, 2, 3, 4]
        taken = []
        for batch in until_signal(range(5), signals):
            taken.append(batch)
            if batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [0, 1]

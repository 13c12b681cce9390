"""`ov2 train`."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip_ov2 import training


def main(argv: Sequence[str]) -> None:
    if set(argv) & {"-h", "--help"}:
        print(training.train_help())
    else:
        training.train(argv)

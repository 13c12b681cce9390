"""Run on forked ranks by test_eval.py: `ov2 eval`."""

from __future__ import annotations


def evaluate(*argv: str) -> int:
    from open_clip_ov2.cli import main

    return main(["eval", *argv])

"""`ov2 train`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    if set(argv) & {"-h", "--help"}:
        from open_clip_ov2.openclip.command.parse import help_text

        print(help_text())
        return
    from open_clip_ov2.openclip.run.runner import train

    train(argv)

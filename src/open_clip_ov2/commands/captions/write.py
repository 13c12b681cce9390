"""`ov2 captions write`: a caption of each picture of many tars, by a model."""

from __future__ import annotations

from typing import Any

from open_clip_ov2.captions.write_options import add_write_flags, parsed_write, run_parsed


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "write",
        help="write captions with a model: one of ours, one of the hub, or vLLM",
        description="Write a caption of each picture of many tars, which stay as they are. If the command is stopped, "
        "the same command continues; in a SLURM array or under torchrun each process has its own shards.",
    )
    add_write_flags(parser)
    parser.set_defaults(run=lambda args: print(run_parsed(parsed_write(args))))

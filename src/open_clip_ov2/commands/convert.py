"""`ov2 convert`: the authors' checkpoints to a model folder of ours, a model back to their Flax parameters, and a
sharded checkpoint to one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import paths_checked


def main(argv: Sequence[str]) -> None:
    args = vars(_parser().parse_args(argv))
    source, to = args.pop("source"), args.pop("to")
    with paths_checked():
        lines = training.convert(source, to, **{name: value for name, value in args.items() if value is not None})
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    from open_clip_ov2.core import FUSIONS

    parser = Parser(
        prog="ov2 convert",
        description="Flax parameters or a released checkpoint -> a model folder; a model -> Flax parameters; a sharded "
        "checkpoint -> a file.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help=".npz, Orbax folder, .dcp folder; or a run, folder or hf-hub: name")
    to = "a new folder, a new .npz of Flax, or a new .pt"
    add("--to", type=Path, required=True, metavar="FOLDER|FILE", help=to)
    add = parser.add_argument_group("what Flax parameters do not say").add_argument
    add("--image-size", type=int, metavar="N", help="default: 224, or the model's own")
    add("--fusion", choices=FUSIONS, help="default: prefix, or cross_attn for a decoder of that kind")
    add("--heads", type=int, metavar="N", help="of the encoder (default: as published for its width)")
    add("--decoder-heads", type=int, metavar="N", help="default: as published for the decoder's width")
    add("--context-length", type=int, metavar="N", help="default: 128")
    add("--tokenizer", metavar="NAME|FILE", help="its vocabulary: vocab.txt, its folder, or a hub name")
    return parser

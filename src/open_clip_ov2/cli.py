"""The `ov2` command: one module of `open_clip_ov2.commands` for each subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from open_clip_ov2.errors import INTERRUPTED_STATUS, Interrupted, UserError

COMMANDS = {
    "train": "train a model with OpenCLIP's flags and ours",
    "plan": "what a recipe will do: tokens, steps, FLOPs, memory, hours",
    "eval": "captions, reading, questions, zero-shot, probes of any model of OpenCLIP's or ours",
    "caption": "caption pictures with a trained model",
    "convert": "the authors' checkpoints into a model of ours, and back",
    "export": "an encoder for transformers, LLaVA, timm, OpenCLIP, ONNX, the authors' code",
    "push": "a model to the hub, with its card",
    "shards": "copies of shards with smaller pictures, for a low-resolution stage",
    "bench": "a training step against CoCa and CLIP on this machine; `ov2 bench data`: the loader",
    "compare": "models on equal terms: the same data, order and optimizer; a table and a page with plots",
    "plot": "draw the curves of one or more runs",
    "submit": "train on SLURM, or here in the background",
    "jobs": "where submitted runs stand; logs, cancel, resubmit",
    "sweep": "train a grid or list of runs, side by side; --report compares them",
}


def usage() -> str:
    rows = "\n".join(f"  ov2 {name:<10}{text}" for name, text in COMMANDS.items())
    return f"usage: ov2 COMMAND ...   (ov2 COMMAND --help says more)\n\n{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error told in one line, 75 stopped by a signal with all saved, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"{name!r} is no command of ov2 (there are: {', '.join(COMMANDS)})")
        import_module(f"open_clip_ov2.commands.{name}").main(rest)
    except UserError as error:
        print(f"ov2: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"ov2: stopped: {stop}", file=sys.stderr)
        return INTERRUPTED_STATUS
    except KeyboardInterrupt:
        print("ov2: interrupted", file=sys.stderr)
        return 130
    return 0

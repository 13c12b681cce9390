"""The `ov2` command: one module of `open_clip_ov2.commands` for each subcommand."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from open_clip_ov2 import __version__
from open_clip_ov2.errors import INTERRUPTED_STATUS, Interrupted, UserError

CTRL_C_STATUS = 130  # 128 + SIGINT, as a shell reports it
CLOSED_PIPE_STATUS = 141  # 128 + SIGPIPE, likewise
COMMANDS = {
    "train": "train a model with OpenCLIP's flags and ours",
    "plan": "show what a training command costs: tokens, steps, FLOPs, memory, hours",
    "eval": "evaluate any model of OpenCLIP's or ours: captions, reading, questions, zero-shot, probes",
    "caption": "caption pictures with a trained model",
    "convert": "convert the authors' checkpoints into a model of ours, and back",
    "export": "export an encoder to transformers, LLaVA, timm, OpenCLIP, ONNX or the authors' format",
    "push": "upload a model and its card to the Hugging Face hub",
    "captions": "captions beside tars: join published ones, write, filter, report",
    "shards": "copy shards with smaller pictures, for a low-resolution stage",
    "bench": "time a training step against CoCa and CLIP; `ov2 bench data` times the data loader",
    "compare": "train and evaluate models on equal terms; writes a table and a page with plots",
    "plot": "draw the curves of one or more runs",
    "vlm": "train and evaluate a multimodal model on an encoder, by LLaVA's recipes",
    "submit": "train on SLURM, or in the background on this machine",
    "jobs": "list submitted runs; show logs, cancel, resubmit",
    "sweep": "train a grid or a list of runs side by side; --report compares them",
}


def usage() -> str:
    rows = "\n".join(f"  ov2 {name:<10}{text}" for name, text in COMMANDS.items())
    return f"usage: ov2 COMMAND ...   (`ov2 COMMAND --help` lists its flags; `ov2 --version`)\n\n{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Exit status: 0 done; 2 an error, reported in one line; 75 stopped by a signal after saving; 130 Ctrl-C;
    141 whoever read the output has left (`ov2 train --help | head`).
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return CLOSED_PIPE_STATUS


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"open_clip_ov2 {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    try:
        if name not in COMMANDS:
            raise UserError(f"{name!r} is not a command of ov2 (known: {', '.join(COMMANDS)})")
        import_module(f"open_clip_ov2.commands.{name}").main(rest)
    except UserError as error:
        print(f"ov2: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"ov2: stopped: {stop}", file=sys.stderr)
        return INTERRUPTED_STATUS
    except KeyboardInterrupt:
        print("ov2: interrupted", file=sys.stderr)
        return CTRL_C_STATUS
    return 0


def _output_is_closed() -> bool:
    """Whether standard output is the pipe that broke, and not a pipe to a worker: an empty line shows it."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except BrokenPipeError:
        return True
    return False

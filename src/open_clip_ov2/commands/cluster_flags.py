"""Flags that `ov2 submit` and `ov2 sweep` share: what is asked of the cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.cluster import COUNTS, ClusterOptions, minutes


def count_of(name: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < COUNTS[name]:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {COUNTS[name]} on")
        return int(text)

    return parse


def _several(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse_all(text: str) -> tuple[Any, ...]:
        try:
            return tuple(parse(part) for part in text.split(","))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_all


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as NAME=VALUE")
    return name, value


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Nothing has a default here: what is not given is the cluster file's, or ClusterOptions'."""
    default = ClusterOptions()
    group = parser.add_argument_group("cluster (defaults: ./ov2-cluster.toml, then ~/.config/ov2/cluster.toml)")
    add = group.add_argument
    add("--cluster", type=Path, metavar="FILE.toml", help="another file of defaults, with these flags as its keys")
    for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude"):
        add(f"--{name}", metavar="TEXT", help=f"sbatch's --{name}")
    add("--nodes", type=_several(count_of("nodes")), metavar="N", help="default: 1; N,N,...: of each stage's job")
    add(
        "--gpus-per-node",
        type=count_of("gpus_per_node"),
        metavar="N",
        help="one process for each (default: 0, on CPUs)",
    )
    add("--tasks-per-node", type=count_of("tasks_per_node"), metavar="N", help="processes (default: --gpus-per-node)")
    add(
        "--cpus-per-task", type=count_of("cpus_per_task"), metavar="N", help="and torch's threads (default: SLURM's, 1)"
    )
    add("--mem-gb", type=_above_zero, metavar="GB", help="memory of a node (default: SLURM's)")
    add("--gpu-memory-gb", type=_above_zero, metavar="GB", help="of each GPU: refuse what is estimated not to fit")
    add("--time", type=_several(minutes), metavar="T", help="30m, 24h, 2d (default: 24h); T,T,...: of each stage's job")
    add(
        "--signal-delay-s",
        type=count_of("signal_delay_s"),
        metavar="S",
        help=f"the job is told to save so long before its time is up (default: {default.signal_delay_s})",
    )
    add(
        "--max-deaths",
        type=count_of("max_deaths"),
        metavar="N",
        help=f"a run that dies N times without a checkpoint in between has failed (default: {default.max_deaths})",
    )
    add("--python", metavar="COMMAND", help="how a job starts Python (default: the Python of this command)")
    add("--container", metavar="IMAGE", help="FILE.sif: apptainer; anything else: pyxis")
    add("--mounts", action="append", metavar="PATH[:PATH]", help="into the container; repeatable")
    add("--setup", action="append", metavar="LINE", help="shell line before the run; repeatable")
    add("--srun-args", action="append", metavar="WORD", help="for srun, as --srun-args=--flag; repeatable")
    add("--environment", action="append", type=_pair, metavar="NAME=VALUE", help="for the job; repeatable")
    add("--sbatch", action="append", type=_pair, metavar="NAME=VALUE", help="any other flag of sbatch; repeatable")


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ClusterOptions."""
    values = {name: getattr(args, name) for name in vars(ClusterOptions()) if getattr(args, name, None) is not None}
    if args.time is not None:
        values["time_min"] = args.time
    for name in ("mounts", "setup", "srun_args"):
        if name in values:
            values[name] = tuple(values[name])
    for name in ("environment", "sbatch"):
        if name in values:
            values[name] = dict(values[name])
    return values


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(before `--`, after it)."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]

"""What a job asks of the cluster: flags of `ov2 submit`, over a TOML file with the same keys, over our defaults."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import add_flags, flag
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.tables import each, keys_of, read_toml, read_values, real, table, text, whole

LOCAL_FILE = Path("ov2-cluster.toml")
USER_FILE = Path("ov2") / "cluster.toml"  # in ~/.config, or XDG_CONFIG_HOME
OF_EACH_STAGE = ("nodes", "time")  # keys of which --stage-jobs takes one value for each stage


def minutes(value: str | int) -> int:
    """`30m`, `24h`, `2d`, `1d12h`, SLURM's `1-12:00:00` and `12:00:00`. Raises UserError."""
    written = str(value).strip()
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", written)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::\d\d)?", written)
    found = units or clock
    if not written or found is None:
        raise UserError(f"{written!r}: expected a time such as 30m, 24h, 2d, 1d12h or 1-12:00:00")
    days, hours, mins = (int(part or 0) for part in found.groups())
    total = 24 * 60 * days + 60 * hours + mins
    if total < 1:
        raise UserError(f"{written!r}: expected at least one minute")
    return total


def _pairs(value: Any) -> dict[str, Any]:
    """A table, or NAME=VALUE texts of the command line."""
    if not isinstance(value, list):
        return table(value)
    pairs = [str(item).partition("=") for item in value]
    for item, (name, equals, _) in zip(value, pairs, strict=True):
        if not name or not equals:
            raise UserError(f"{item!r}: expected NAME=VALUE")
    return {name: item for name, _, item in pairs}


def _texts(value: Any) -> dict[str, str]:
    return {name: str(item) for name, item in _pairs(value).items()}


def _of_sbatch(name: str) -> Any:
    return flag("TEXT", text, f"sbatch's --{name}")


@dataclass(frozen=True)
class ClusterOptions:
    """Resources of one job, and how it starts. Each field is a key of the cluster file and a flag of `ov2 submit`."""

    partition: str | None = _of_sbatch("partition")
    account: str | None = _of_sbatch("account")
    qos: str | None = _of_sbatch("qos")
    constraint: str | None = _of_sbatch("constraint")
    nodelist: str | None = _of_sbatch("nodelist")
    exclude: str | None = _of_sbatch("exclude")
    nodes: int = flag("N", whole(1), "default: 1; N,N,... with --stage-jobs: one for each stage", default=1)
    gpus_per_node: int = flag("N", whole(0), "one process for each (default: 0, train on CPUs)", default=0)
    tasks_per_node: int | None = flag("N", whole(1), "processes (default: --gpus-per-node)")
    cpus_per_task: int | None = flag(
        "N", whole(1), "also the number of torch's threads (default: SLURM's, and 1 thread)"
    )
    mem_gb: float | None = flag("GB", real(0, above=True), "memory of a node (default: SLURM's)")
    gpu_memory_gb: float | None = flag(
        "GB", real(0, above=True), "memory of a GPU: refuse a batch estimated not to fit"
    )
    time_min: int = flag(
        "T", minutes, "30m, 24h, 2d (default: 24h); T,T,... with --stage-jobs: one for each stage", default=24 * 60,
        name="time",
    )  # fmt: skip
    signal_delay_s: int = flag(
        "S", whole(0), "seconds before the time limit at which the run saves (default: 120)", default=120
    )
    max_deaths: int = flag(
        "N", whole(1), default=3,
        help="requeue a run that loses ranks until this happened N times without a new checkpoint (default: 3)",
    )  # fmt: skip
    max_running: int = flag("N", whole(1), "of an array, how many run at once (default: 256)", default=256)
    python: str | None = flag("COMMAND", text, "starts Python (default: this Python)")
    container: str | None = flag("IMAGE", text, "FILE.sif: apptainer; else: pyxis")
    mounts: tuple[str, ...] = flag(
        "PATH[:PATH]", each(text), "mount into the container; repeatable", default=(), repeat=True
    )
    setup: tuple[str, ...] = flag("LINE", each(text), "shell line before the run; repeatable", default=(), repeat=True)
    srun_args: tuple[str, ...] = flag(
        "FLAG", each(text), "for srun, as --srun-args=--flag; repeatable", default=(), repeat=True
    )
    environment: Mapping[str, str] = flag(
        "NAME=VALUE", _texts, "environment variable of the job; repeatable", default=dict, repeat=True
    )
    sbatch: Mapping[str, Any] = flag(
        "NAME=VALUE", _pairs, "any other flag of sbatch; repeatable", default=dict, repeat=True
    )

    @property
    def tasks(self) -> int:
        """Processes on each node: one for each GPU."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def in_apptainer(self) -> bool:
        return (self.container or "").endswith(".sif")

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks

    @property
    def threads(self) -> int:
        """Of torch in each task. 1 by default, as in torchrun, so that sums on a CPU are the same."""
        return self.cpus_per_task or 1


def find_file(given: Path | None) -> Path | None:
    """The given cluster file, else ./ov2-cluster.toml, else ~/.config/ov2/cluster.toml, else None."""
    if given is not None:
        return given
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (LOCAL_FILE, config / USER_FILE) if path.is_file()), None)


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each key of the cluster file; `resolve` reads their values as it reads those of the file."""
    group = parser.add_argument_group("cluster (defaults: ./ov2-cluster.toml, then ~/.config/ov2/cluster.toml)")
    group.add_argument("--cluster", type=Path, metavar="FILE.toml", help="another cluster file: these flags as keys")
    add_flags(group, ClusterOptions, as_text=True)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The cluster flags that were given, by key, as text or a list of texts."""
    values = {name: getattr(args, name.replace("-", "_")) for name in keys_of(ClusterOptions)}
    return {name: value for name, value in values.items() if value is not None}


def resolve(flags: Mapping[str, Any], file: Path | None, jobs: int = 1) -> tuple[ClusterOptions, ...]:
    """The options of each of `jobs` jobs; `flags` of `given_flags` win over `file`. Raises UserError."""
    base = read_values(ClusterOptions, str(file), read_toml(file)) if file is not None else {}
    fields, out = keys_of(ClusterOptions), []
    for index in range(jobs):
        own = dict(base)
        for name, value in flags.items():
            field = fields[name]
            with naming(f"--{name}"):
                read = field.metadata["read"](_of_job(name, value, index, jobs))
            own[field.name] = {**base.get(field.name, {}), **read} if isinstance(read, dict) else read
        out.append(ClusterOptions(**own))
    return tuple(out)


def _of_job(name: str, value: Any, index: int, jobs: int) -> Any:
    if name not in OF_EACH_STAGE:
        return value
    values = value.split(",")
    if len(values) not in (1, jobs):
        count = "there is one job" if jobs == 1 else f"there are {jobs} stages"
        raise UserError(f"{len(values)} values, but {count}; give one, or with --stage-jobs one for each stage")
    return values[index if len(values) > 1 else 0]

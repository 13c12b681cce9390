"""What a job asks of the cluster: flags over a small user file over our defaults. Units stand in names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.toml import read_toml

FILE_HERE = Path("ov2-cluster.toml")
FILE_OF_USER = Path("ov2") / "cluster.toml"  # in ~/.config, or XDG_CONFIG_HOME


@dataclass(frozen=True)
class ClusterOptions:
    """One job's wishes. `mem_gb` is per node; `gpus_per_node=0` is a run on CPUs.

    `signal_delay_s` before its time is up a job is told to save. `max_deaths`: how often a run may die without a reason
    of its own and without a checkpoint in between.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    gpu_memory_gb: float | None = None
    time_min: int = 24 * 60
    signal_delay_s: int = 120
    max_deaths: int = 3
    max_running: int = 256
    python: str | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    sbatch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Of each node: one for each GPU."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks

    @property
    def threads(self) -> int:
        """Of each task's torch. One without a say, as torchrun does, so that sums on a CPU are the same."""
        return self.cpus_per_task or 1


TEXT = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "python", "container")
COUNTS = {  # smallest value
    "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "signal_delay_s": 0, "max_deaths": 1,
    "max_running": 1,
}  # fmt: skip
NUMBERS = ("mem_gb", "gpu_memory_gb")
LISTS = ("mounts", "setup", "srun_args")
TABLES = ("environment", "sbatch")
KEYS = tuple(sorted("time" if item.name == "time_min" else item.name for item in fields(ClusterOptions)))


def minutes(text: str | int) -> int:
    """`30m`, `24h`, `2d`, `1d12h`, SLURM's `1-12:00:00` and `12:00:00`. Raises UserError."""
    text = str(text).strip()
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::\d\d)?", text)
    found = units or clock
    if not text or found is None:
        raise UserError(f"time {text!r}: write it as 30m, 24h, 2d, 1d12h or 1-12:00:00")
    days, hours, mins = (int(part or 0) for part in found.groups())
    total = 24 * 60 * days + 60 * hours + mins
    if total < 1:
        raise UserError(f"time {text!r}: less than a minute")
    return total


def of_file(path: Path) -> dict[str, Any]:
    """Fields of ClusterOptions from a TOML file. Raises UserError."""
    table = read_toml(path)
    return {name: value for key, raw in table.items() for name, value in [_checked(key, raw, f"{path}: ")]}


def _checked(key: str, raw: Any, where: str) -> tuple[str, Any]:
    """(field, value) of one key, in kebab or snake case."""
    name = key.replace("-", "_")
    if name not in KEYS:
        near = get_close_matches(name, KEYS, n=1)
        hint = f"nearest: {near[0].replace('_', '-')}; " if near else ""
        there = ", ".join(item.replace("_", "-") for item in KEYS)
        raise UserError(f"{where}{key}: no such key ({hint}there are: {there})")
    where = f"{where}{key}"
    if name == "time":
        try:
            return "time_min", minutes(raw)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if name in TEXT and isinstance(raw, str) and raw:
        return name, raw
    if name in COUNTS and isinstance(raw, int) and not isinstance(raw, bool) and raw >= COUNTS[name]:
        return name, raw
    if name in NUMBERS and isinstance(raw, (int, float)) and not isinstance(raw, bool) and raw > 0:
        return name, float(raw)
    if name in LISTS and isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        return name, tuple(raw)
    if name in TABLES and isinstance(raw, dict):
        return name, {str(k): v if name == "sbatch" else str(v) for k, v in raw.items()}
    raise UserError(f"{where} = {raw!r}: must be {_wanted(name)}")


def _wanted(name: str) -> str:
    if name in COUNTS:
        return f"a whole number, at least {COUNTS[name]}"
    if name in NUMBERS:
        return "a number above 0"
    if name in LISTS:
        return "a list of texts"
    return "a table" if name in TABLES else "a text"


def find_file(given: Path | None) -> Path | None:
    """The cluster file: the one given, ./ov2-cluster.toml, ~/.config/ov2/cluster.toml, or none."""
    if given is not None:
        return given
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (FILE_HERE, config / FILE_OF_USER) if path.is_file()), None)


def resolve(given: Mapping[str, Any], file: Path | None, jobs: int = 1) -> tuple[ClusterOptions, ...]:
    """One ClusterOptions for each of so many jobs. `given` (flags) wins over `file`.

    A flag given as a list has one value for each job. Raises UserError.
    """
    base = of_file(file) if file is not None else {}
    out = []
    for index in range(jobs):
        own = {key: _of_job(key, value, index, jobs) for key, value in given.items()}
        tables = {key: {**base.get(key, {}), **own[key]} for key in TABLES if key in own}
        out.append(replace(ClusterOptions(), **{**base, **own, **tables}))
    return tuple(out)


def _of_job(key: str, value: Any, index: int, jobs: int) -> Any:
    if key not in ("nodes", "time_min") or not isinstance(value, Sequence):
        return value
    if len(value) not in (1, jobs):
        flag = "--time" if key == "time_min" else "--nodes"
        what = "there is one job" if jobs == 1 else f"there are {jobs} stages"
        raise UserError(f"{flag}: {len(value)} values, and {what}; several are for --stage-jobs, one for each stage")
    return value[index if len(value) > 1 else 0]

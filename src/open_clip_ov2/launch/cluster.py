"""What a job asks of the cluster: flags of `ov2 submit`, over a TOML file with the same keys, over our defaults."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import flag_type
from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import each, key, keys_of, read_toml, read_values, real, table, text, whole

LOCAL_FILE = Path("ov2-cluster.toml")
USER_FILE = Path("ov2") / "cluster.toml"  # in ~/.config, or XDG_CONFIG_HOME
OF_EACH_STAGE = ("nodes", "time_min")  # fields of which --stage-jobs takes one value for each stage


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


def _texts(value: Any) -> dict[str, str]:
    return {name: str(item) for name, item in table(value).items()}


def _of_sbatch(name: str) -> Any:
    return key(text, default=None, metavar="TEXT", help=f"sbatch's --{name}")


@dataclass(frozen=True)
class ClusterOptions:
    """Resources of one job, and how it starts. Each field is a key of the cluster file and a flag of `ov2 submit`."""

    partition: str | None = _of_sbatch("partition")
    account: str | None = _of_sbatch("account")
    qos: str | None = _of_sbatch("qos")
    constraint: str | None = _of_sbatch("constraint")
    nodelist: str | None = _of_sbatch("nodelist")
    exclude: str | None = _of_sbatch("exclude")
    nodes: int = key(whole(1), default=1, metavar="N", help="default: 1; N,N,... with --stage-jobs: one for each stage")
    gpus_per_node: int = key(whole(0), default=0, metavar="N", help="one process for each (default: 0, train on CPUs)")
    tasks_per_node: int | None = key(whole(1), default=None, metavar="N", help="processes (default: --gpus-per-node)")
    cpus_per_task: int | None = key(
        whole(1), default=None, metavar="N", help="also the number of torch's threads (default: SLURM's, and 1 thread)"
    )
    mem_gb: float | None = key(
        real(0, above=True), default=None, metavar="GB", help="memory of a node (default: SLURM's)"
    )
    gpu_memory_gb: float | None = key(
        real(0, above=True), default=None, metavar="GB", help="memory of a GPU: refuse a batch estimated not to fit"
    )
    time_min: int = key(
        minutes, default=24 * 60, name="time", metavar="T",
        help="30m, 24h, 2d (default: 24h); T,T,... with --stage-jobs: one for each stage",
    )  # fmt: skip
    signal_delay_s: int = key(
        whole(0), default=120, metavar="S", help="seconds before the time limit at which the run saves (default: 120)"
    )
    max_deaths: int = key(
        whole(1), default=3, metavar="N",
        help="requeue a run that loses ranks until this happened N times without a new checkpoint (default: 3)",
    )  # fmt: skip
    max_running: int = key(whole(1), default=256, metavar="N", help="how many runs run at once (default: 256)")
    python: str | None = key(text, default=None, metavar="COMMAND", help="starts Python (default: this Python)")
    container: str | None = key(text, default=None, metavar="IMAGE", help="FILE.sif: apptainer; else: pyxis")
    mounts: tuple[str, ...] = key(
        each(text), default=(), metavar="PATH[:PATH]", help="mount into the container; repeatable"
    )
    setup: tuple[str, ...] = key(each(text), default=(), metavar="LINE", help="shell line before the run; repeatable")
    srun_args: tuple[str, ...] = key(
        each(text), default=(), metavar="FLAG", help="for srun, as --srun-args=--flag; repeatable"
    )
    environment: Mapping[str, str] = key(
        _texts, default=dict, metavar="NAME=VALUE", help="environment variable of the job; repeatable"
    )
    sbatch: Mapping[str, Any] = key(
        table, default=dict, metavar="NAME=VALUE", help="any other flag of sbatch; repeatable"
    )

    @property
    def tasks(self) -> int:
        """Processes on each node: one for each GPU."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

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


def resolve(flags: Mapping[str, Any], file: Path | None, jobs: int = 1) -> tuple[ClusterOptions, ...]:
    """The options of each of `jobs` jobs; `flags` (by field name) win over `file`.

    A flag in OF_EACH_STAGE is a tuple of one value, or of one for each job. Raises UserError.
    """
    base = read_values(ClusterOptions, str(file), read_toml(file)) if file is not None else {}
    out = []
    for index in range(jobs):
        own = {name: _of_job(name, value, index, jobs) for name, value in flags.items()}
        for name in ("environment", "sbatch"):
            if name in own:
                own[name] = {**base.get(name, {}), **own[name]}
        out.append(ClusterOptions(**{**base, **own}))
    return tuple(out)


def _of_job(name: str, value: Any, index: int, jobs: int) -> Any:
    if name not in OF_EACH_STAGE:
        return value
    if len(value) not in (1, jobs):
        flag = "--time" if name == "time_min" else f"--{name}"
        count = "there is one job" if jobs == 1 else f"there are {jobs} stages"
        raise UserError(f"{flag}: {len(value)} values, but {count}; give one, or with --stage-jobs one for each stage")
    return value[index if len(value) > 1 else 0]


_OPTIONS = keys_of(ClusterOptions)


def add_cluster_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """A flag for each key of the cluster file. None has a default: the file or ClusterOptions gives the value."""
    group = parser.add_argument_group("cluster (defaults: ./ov2-cluster.toml, then ~/.config/ov2/cluster.toml)")
    group.add_argument("--cluster", type=Path, metavar="FILE.toml", help="another cluster file: these flags as keys")
    for name, field in _OPTIONS.items():
        if name not in without:
            shown: dict[str, Any] = {"metavar": field.metadata["metavar"], "help": field.metadata["help"]}
            group.add_argument(f"--{name}", dest=field.name, **_reading(field), **shown)


def _reading(field: Field[Any]) -> dict[str, Any]:
    """How argparse reads a flag."""
    read = field.metadata["read"]
    if field.name in OF_EACH_STAGE:
        return {"type": flag_type(lambda text: tuple(read(part) for part in text.split(",")))}
    if field.default_factory is dict:
        return {"type": flag_type(_pair), "action": "append"}
    return {"action": "append"} if field.default == () else {"type": flag_type(read)}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"{text!r}: expected NAME=VALUE")
    return name, value


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ClusterOptions that were given as flags."""
    values: dict[str, Any] = {}
    for field in _OPTIONS.values():
        value = getattr(args, field.name, None)
        if isinstance(value, list):
            value = dict(value) if field.default_factory is dict else tuple(value)
        if value is not None:
            values[field.name] = value
    return values

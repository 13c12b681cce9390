"""What is asked of the cluster. Oracles: arithmetic, the table written out here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_clip_ov2.errors import UserError
from open_clip_ov2.launch.cluster import ClusterOptions, add_cluster_flags, find_file, given_flags, minutes, resolve
from open_clip_ov2.tables import keys_of


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59))
def test_time_in_every_writing(days: int, hours: int, mins: int) -> None:
    """Oracle: arithmetic."""
    total = days * 1440 + hours * 60 + mins
    if total == 0:
        return
    assert minutes(f"{days}-{hours:02d}:{mins:02d}:00") == total
    assert minutes(f"{days * 24 + hours}:{mins:02d}:00") == total
    assert minutes(f"{days}d{hours}h{mins}m") == total
    assert minutes(f"{total}m") == total


@pytest.mark.parametrize("text", ["", "24", "0m", "1y", "1:2", "h", "-1h", "1.5h"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"1-12:00:00|at least one minute"):
        minutes(text)


FILE = """\
partition = "train"
nodes = 2
gpus-per-node = 8
time = "2d"
mem-gb = 500
setup = ["module load cuda", "source env/bin/activate"]
[environment]
NCCL_DEBUG = "WARN"
NCCL_IB_HCA = "mlx5"
[sbatch]
reservation = "vision"
exclusive = true
"""


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(FILE)
    flags = {"nodes": "4", "environment": ["NCCL_DEBUG=INFO"]}
    (options,) = resolve(flags, file)
    assert options.partition == "train"
    assert (options.nodes, options.gpus_per_node, options.world_size) == (4, 8, 32)
    assert options.time_min == 2880
    assert options.setup == ("module load cuda", "source env/bin/activate")
    assert options.environment == {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5"}
    assert options.sbatch == {"reservation": "vision", "exclusive": True}
    assert options.signal_delay_s == ClusterOptions().signal_delay_s


def test_a_value_for_each_stage() -> None:
    one, two = resolve({"nodes": "8,16", "time": "1h"}, None, jobs=2)
    assert (one.nodes, two.nodes, one.time_min, two.time_min) == (8, 16, 60, 60)
    with pytest.raises(UserError, match="--nodes: 3 values, but there are 2 stages"):
        resolve({"nodes": "1,2,3"}, None, jobs=2)
    with pytest.raises(UserError, match="--stage-jobs"):
        resolve({"nodes": "1,2"}, None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('partitions = "x"', "did you mean partition"),
        ("nodes = 0", "nodes: 0: expected an integer >= 1"),
        ("nodes = true", "expected an integer"),
        ('nodes = "two"', "expected an integer"),
        ("partition = 3", "expected text"),
        ('setup = "module load cuda"', "expected a list"),
        ("setup = [1]", "expected text"),
        ('time = "soon"', "time: 'soon': expected a time such as 30m"),
        ("mem-gb = -1", "mem-gb: -1: expected a number > 0"),
        ("environment = 1", "expected a table"),
        ("nodes = ", "not TOML"),
    ],
)
def test_a_slip_in_the_file_names_file_and_key(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=expected) as error:
        resolve({}, file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_key_of_the_file_is_a_flag() -> None:
    """Oracle: the parser."""
    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings if action.help}
    assert [key for key in keys_of(ClusterOptions) if f"--{key}" not in flags] == []
    assert len(keys_of(ClusterOptions)) == len(dataclasses.fields(ClusterOptions))


def test_flags_become_options() -> None:
    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    words = ["--nodes=2", "--time=1h30m", "--environment=A=1", "--environment=B=x=y", "--srun-args=--mpi=none"]
    (options,) = resolve(given_flags(parser.parse_args([*words, "--mem-gb=64"])), None)
    assert (options.nodes, options.time_min, options.mem_gb) == (2, 90, 64.0)
    assert options.environment == {"A": "1", "B": "x=y"}
    assert options.srun_args == ("--mpi=none",)


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert find_file(None) is None
    (tmp_path / "config" / "ov2").mkdir(parents=True)
    (tmp_path / "config" / "ov2" / "cluster.toml").write_text("nodes = 1\n")
    assert find_file(None) == tmp_path / "config" / "ov2" / "cluster.toml"
    Path("ov2-cluster.toml").write_text("nodes = 2\n")
    assert find_file(None) == Path("ov2-cluster.toml")
    assert find_file(Path("mine.toml")) == Path("mine.toml")

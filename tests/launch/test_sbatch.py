"""The sbatch text. Oracles: golden files read by a person, and bash's own parser."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from open_clip_ov2.launch import executor
from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import Submission

GOLDEN = Path(__file__).parent / "golden"
SUBMISSION = Submission(Path("/shared/logs/run/submit/001"))
CASES = {
    "gpus": (
        ClusterOptions(
            partition="train", account="vision", nodes=8, gpus_per_node=8, cpus_per_task=12, mem_gb=1000.0,
            python="/env/bin/python", setup=("module load cuda",),
            environment={"NCCL_DEBUG": "WARN", "GREETING": "a b"}, sbatch={"reservation": "vision"},
        ),
        {},
    ),
    "apptainer_stage_2": (
        ClusterOptions(
            gpus_per_node=4, time_min=90, container="/images/torch.sif", mounts=("/shared", "/data:/data"),
        ),
        {"after": "17"},
    ),
    "pyxis": (
        ClusterOptions(gpus_per_node=1, container="nvcr.io#nvidia/pytorch:25.09-py3", mounts=("/shared:/shared",)), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_golden_text(case: str) -> None:
    options, more = CASES[case]
    text = executor.slurm(SUBMISSION, options, "run", **more).text()
    assert text == (GOLDEN / f"{case}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_options_that_are_not_said_are_not_asked_for() -> None:
    """SLURM's own defaults must stay in force."""
    text = executor.slurm(SUBMISSION, ClusterOptions(python="python"), "run").text()
    for flag in ("partition", "account", "gpus-per-node", "mem", "cpus-per-task", "array", "dependency"):
        assert f"--{flag}=" not in text


def test_signals_are_ignored_until_python_handles_them(tmp_path: Path) -> None:
    """Oracle: the kernel's mask of ignored signals, as Python is started by the job's command."""
    mask = "import re; print(re.search(r'SigIgn:\\s*(\\w+)', open('/proc/self/status').read())[1])"
    options = ClusterOptions()
    command = executor._ignoring_signals(executor.python_command(options)) + f' -c "{mask}"'
    ignored = int(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout, 16)
    usr2, term = 12, 15
    assert ignored >> (usr2 - 1) & 1
    assert ignored >> (term - 1) & 1

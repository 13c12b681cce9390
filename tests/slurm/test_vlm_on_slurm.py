"""`ov2 submit -- vlm train` on a real SLURM, two processes on two nodes. Oracle: the weights of the same run by two
processes on this machine, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL needs Python 3.11")
sys.path.insert(0, str(Path(__file__).parents[1] / "vlm"))

import export_fixtures
import tiny_llava
from faults import ONE_A_NODE, job_of, ov2, requeue, wait_finished, wait_for_steps
from safetensors.torch import load_file
from slurm_cluster import Cluster
from training import finish, start_ranks

from open_clip_ov2.cli import main


def _vlm_train(*flags: str) -> int:
    return main(["vlm", "train", *flags])


def test_a_requeued_run_ends_in_the_same_weights(cluster: Cluster, tmp_path: Path) -> None:
    export_fixtures.make_run(tmp_path / "encoder")
    tiny_llava.make_language_model(tmp_path / "lm")
    tiny_llava.make_conversations(tmp_path / "data", 96)
    tiny_llava.write_recipe(tmp_path / "recipe.toml")
    data = [
        word
        for name in ("align", "tune")
        for word in (f"--{name}-data", f"{tmp_path}/data/{name}.json", f"--{name}-images", f"{tmp_path}/data/pictures")
    ]
    argv = [
        str(tmp_path / "encoder"), "--recipe", str(tmp_path / "recipe.toml"), "--language-model", str(tmp_path / "lm"),
        *data, "--workers", "0", "--batch-size", "2", "--save-every-steps", "2", "--log-every-n-steps", "1",
    ]  # fmt: skip
    run = tmp_path / "slurm"
    ov2("submit", *ONE_A_NODE, "--", "vlm", "train", *argv, "--out", str(run), cwd=tmp_path)
    assert wait_for_steps(run, 0), "the run was over before it was requeued"
    requeue(cluster, job_of(run))
    here = start_ranks(_vlm_train, [*argv, "--out", str(tmp_path / "here")], 2)  # while the job waits
    found = wait_finished(run)
    assert found.status is not None
    assert (found.status.restarts, found.status.samples_seen) == (1, 192)
    done = finish(here)
    assert [status for status, _ in done] == [0, 0], done
    first, second = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "here"))
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []

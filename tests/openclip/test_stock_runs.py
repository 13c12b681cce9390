"""Flags of stock OpenCLIP whose effect shows in a run: its steps, records, checkpoints, log and processes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from begun import begin, registered
from open_clip_train.distributed import init_distributed_device
from training import TINY_MODEL, Rank, finish, results, weights

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.parse import parse

MODELS = ["ov2", "clip"]


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[None]:
    with registered():
        yield


def flags_of(model: str, vocabulary: Path) -> list[str]:
    ov2_flags = ["--model", TINY_MODEL, "--force-image-size", "24", "--sample-captions", "0"]
    return [*(ov2_flags if model == "ov2" else ["--model", "tiny_clip"]), "--tokenizer", str(vocabulary)]


def data(squares: Path, *flags: str) -> list[str]:
    tars = ["--train-data", f"{squares}/train/00000.tar", "--val-data", f"{squares}/val/00000.tar"]
    return [*tars, "--train-num-samples", "8", "--workers", "0", "--force-context-length", "12", *flags]


@pytest.mark.parametrize("model", MODELS)
def test_steps_records_and_checkpoints_are_as_asked(
    squares: Path, vocabulary: Path, tmp_path: Path, model: str
) -> None:
    """Three epochs of two steps. Oracles: a clipped step of plain gradient descent moves the weights by the learning
    rate times the norm; the records, files and lines, counted by hand."""
    flags = ["--opt", "timm/momentum", "--momentum", "0", "--lr", "0.5", "--wd", "0", "--grad-clip-norm", "1e-3"]
    flags += ["--skip-scheduler", "--warmup", "9", "--epochs", "3", "--batch-size", "4", "--log-every-n-steps", "3"]
    flags += ["--save-frequency", "2", "--val-frequency", "2", "--keep-checkpoints", "9", "--debug"]
    flags += ["--save-every-steps", "5"]
    if model == "ov2":
        flags += ["--coca-caption-loss-weight", "3"]
    assert (
        ov2(["train", *flags_of(model, vocabulary), *data(squares, *flags), "--logs", str(tmp_path), "--name", "run"])
        == 0
    )
    run = tmp_path / "run"
    rows = results(run, "train")
    assert [row["samples_seen"] for row in rows] == [4, 12, 24]
    assert {row["lr"] for row in rows} == {0.5}
    if model == "ov2":
        assert rows[0]["loss"] == pytest.approx(3 * rows[0]["caption_loss"])
    assert [row["samples_seen"] for row in results(run, "val")] == [16, 24]
    names = ["best.json", "stage_1.pt", "stage_1_samples_16.pt", "stage_1_samples_20.pt"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    last, _, before = (weights(run / "checkpoints" / name) for name in names[1:])
    moved = math.sqrt(sum(float((last[name] - value).double().square().sum()) for name, value in before.items()))
    assert moved == pytest.approx(0.5 * 1e-3, rel=0.02)  # the weights are float32
    assert " | DEBUG | " in (run / "out.log").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_accumulated_batches_are_one_batch(squares: Path, vocabulary: Path, tmp_path: Path, model: str) -> None:
    """Oracle: the same samples in one batch, CLIP's negatives among them; without token dropping, which is drawn for
    each batch, and but for the gradient of CLIP's temperature, which OpenCLIP adds up over the batches."""
    ends = []
    for size, count in (("8", "1"), ("4", "2")):
        flags = data(squares, "--batch-size", size, "--accum-freq", count, "--opt", "timm/momentum", "--momentum", "0")
        flags += ["--lr", "0.01", "--warmup", "0", "--epochs", "1", "--logs", str(tmp_path), "--name", size]
        flags += ["--keep-ratio", "1"] if model == "ov2" else []
        assert ov2(["train", *flags_of(model, vocabulary), *flags]) == 0
        ends.append(weights(tmp_path / size / "checkpoints" / "stage_1.pt"))
    ends[0].pop("logit_scale", None)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4)


def test_moments_are_carried_and_checkpoints_written_by_the_clock(
    squares: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """Two stages of a step and of two. Oracle: Adam's own count of its steps."""
    flags = ["--train-data", f"{squares}/train/00000.tar", "--workers", "0", "--force-context-length", "12"]
    flags += ["--warmup", "0", "--stage", "16:samples=8,lr=1e-3", "--stage", "24:samples=8,lr=1e-3,batch-size=4"]
    for name, more, count in (("plain", [], 2), ("carried", ["--carry-optimizer"], 3)):
        run = ["--batch-size", "8", "--save-every-minutes", "1e-6", "--logs", str(tmp_path), "--name", name, *more]
        assert ov2(["train", *flags_of("ov2", vocabulary)[:2], "--tokenizer", str(vocabulary), *flags, *run]) == 0
        folder = tmp_path / name / "checkpoints"
        assert {path.name for path in folder.glob("*.pt")} == {"stage_1.pt", "stage_2_samples_12.pt", "stage_2.pt"}
        saved = torch.load(folder / "stage_2.pt", weights_only=True)
        assert {float(state["step"]) for state in saved["optimizer"]["state"].values()} == {count}


def test_wandb_gets_project_and_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: Path, request: pytest.FixtureRequest
) -> None:
    """Oracle: W&B's own settings of the run; what it makes of them: test_sinks.py."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    request.addfinalizer(wandb.teardown)  # or every later session of this process would be disabled too
    asked: list[dict[str, Any]] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or init(**options))
    flags = ["--report-to", "wandb", "--wandb-project-name", "pictures", "--wandb-notes", "a note"]
    begin(tmp_path, *flags_of("ov2", vocabulary), *flags)
    assert (asked[0]["project"], asked[0]["notes"]) == ("pictures", "a note")


def look_at_rank(folder: Path, *flags: str) -> int:
    """Rank: what two processes of ResNet's CLIP begin with, and the device that each would take of several."""
    rank = int(os.environ["SLURM_PROCID"])

    def look(begun: Any) -> dict[str, Any]:
        backend = torch.distributed.distributed_c10d.get_backend_config()
        return {"static": begun.model.static_graph, "backend": backend}

    with registered():
        seen = begin(folder, "--model", "tiny_resnet", *flags, processes=2, look=look)
        sync = ["--dist-url", f"file://{folder}/meet-sync", "--use-bn-sync"]
        with pytest.raises(UserError, match="--use-bn-sync: torch synchronizes batch norm on GPUs alone"):
            begin(folder / "other", "--model", "tiny_resnet", *sync, processes=2)
        torch.distributed.destroy_process_group()
        for name, more in (("own", []), ("given", ["--no-set-device-rank"])):
            asked = ["--model", "tiny_resnet", "--dataset-type", "synthetic", "--train-num-samples", "8", *more]
            asked += ["--device", "meta", "--dist-backend", "gloo", "--dist-url", f"file://{folder}/{name}"]
            seen[name] = str(init_distributed_device(parse(asked, world_size=2, gpu=False).stages[0].args))
            torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    return 0


def test_two_processes_are_connected_as_asked(tmp_path: Path) -> None:
    """The first processes of two machines, as SLURM starts them; nothing else says where they meet. The device `meta`
    stands for one that has a number. Oracles: torch's own names."""
    flags = ["--dist-url", f"file://{tmp_path}/meet", "--dist-backend", "cpu:gloo"]
    flags += ["--ddp-static-graph", "--log-local"]
    places = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"} for rank in ("0", "1")]
    places[1]["SLURM_LOCALID"] = "0"
    done = finish([Rank(look_at_rank, [tmp_path, *flags], place) for place in places])
    assert [status for status, _ in done] == [0, 0], done
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == {
            "static": True, "backend": "cpu:gloo", "own": "meta:0", "given": "meta"
        }  # fmt: skip
        assert (tmp_path / "run" / ("out.log" if rank == 0 else "out-1.log")).stat().st_size > 0

"""--fsdp: the model sharded over processes by torch's FSDP2. Oracles: DDP on the same data; the run that was not
stopped; the file that a whole checkpoint is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from training import assert_equal_weights, data_flags, figures, finish, results, samples_of, start, wait_for, weights

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.errors import INTERRUPTED_STATUS, UserError
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.models.factory import MODEL_CONFIGS
from open_clip_ov2.train.checkpoint import RESUME_KEY, list_checkpoints, read_checkpoint

TINY = str(Path(__file__).parent / "old_run" / "tiny")
# What Adam does with a gradient that is zero but for rounding, such as that of a key's bias, is noise; not with this.
EPS = ["--eps", "1e-4"]
AVERAGE = ["--ema-decay", "0.9", "--grad-clip-norm", "0.5", *EPS]


def flags(squares: Path, vocabulary: Path, logs: Path, name: str, *more: str, batch: int) -> list[str]:
    here = ["--logs", str(logs), "--name", name, "--model", f"local-dir:{TINY}", "--force-context-length", "12"]
    here += ["--tokenizer", str(vocabulary), "--log-every-n-steps", "1", "--sample-captions", "2"]
    return [*data_flags(squares), *here, "--force-image-size", "16", *more, "--batch-size", str(batch)]


def train(processes: int, argv: Sequence[str]) -> None:
    done = finish(start(argv, processes))
    assert [status for status, _ in done] == [0] * processes, done


def losses(run: Path) -> torch.Tensor:
    rows = [*results(run, "train"), *results(run, "val")]
    assert rows
    return torch.tensor([next(value for key, value in row.items() if "loss" in key) for row in rows])


def assert_close(run: Path, other: Path) -> None:
    """Losses of training and validation, and what each checkpoint file has."""
    torch.testing.assert_close(losses(run), losses(other), atol=1e-5, rtol=0)
    for path in list_checkpoints(other / "checkpoints"):
        one, two = weights(run / "checkpoints" / path.name), weights(path)
        assert one.keys() == two.keys()
        for name, value in two.items():
            torch.testing.assert_close(one[name], value, atol=2e-6, rtol=0, msg=f"{path.name} {name}")


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, [*AVERAGE, "--accum-freq", "2", "--recompute-elementwise", "--opt", "timm/muon"]),
        (2, ["--model", "local-dir:{baselines}/coca_tiny", *EPS]),
        (4, [*AVERAGE, "--grad-checkpointing", "--sample-captions", "0", "--fsdp-hybrid", "2"]),
    ],
)
def test_it_is_the_same_training_as_ddp(
    squares: Path, vocabulary: Path, baselines: Path, tmp_path: Path, processes: int, more: list[str]
) -> None:
    """An ov2 model and a CoCa; averages, clipping, accumulation, recomputation and Muon's whole matrices."""
    batch = 8 // processes // (2 if "--accum-freq" in more else 1)
    more = [word.format(baselines=baselines) for word in more]
    hybrid = more[-2:] if "--fsdp-hybrid" in more else []
    more = more[: len(more) - len(hybrid)]
    for name, how in (("ddp", []), ("fsdp", ["--fsdp", *hybrid])):
        train(processes, flags(squares, vocabulary, tmp_path, name, *more, *how, batch=batch))
    assert_close(tmp_path / "fsdp", tmp_path / "ddp")
    found = re.search(r"FSDP2: ([\d,]+) of ([\d,]+) parameters", (tmp_path / "fsdp" / "out.log").read_text())
    assert found
    own, of_all = (int(number.replace(",", "")) for number in found.groups())
    parts = int(hybrid[1]) if hybrid else processes
    assert of_all / parts <= own < 1.1 * of_all / parts


def test_compiled_and_in_bfloat16_it_is_near_ddp(
    squares: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are compiled, parameters gathered in bfloat16. Oracle: DDP with autocast, to bfloat16's 8 bits."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process starts others to compile
    more = ["--precision", "amp_bf16", "--train-num-samples", "24", *EPS]
    for name, how in (("ddp", []), ("fsdp", ["--fsdp", "--torchcompile"])):
        train(2, flags(squares, vocabulary, tmp_path, name, *more, *how, batch=4))
    both = [losses(tmp_path / name) for name in ("fsdp", "ddp")]
    torch.testing.assert_close(*both, atol=0, rtol=2**-7)
    assert not torch.equal(*both)


@pytest.mark.parametrize("size", ["bigg", "6b"])
def test_the_larger_sizes_train(squares: Path, vocabulary: Path, tmp_path: Path, size: str) -> None:
    """All blocks of both, at width 64. Oracle: DDP."""
    config = json.loads((MODEL_CONFIGS / f"ov2-vit-{size}-14.json").read_text())
    config["vision_cfg"] |= {"width": 64, "head_width": 32, "image_size": 28}
    config |= {"embed_dim": 64, "decoder_cfg": {**config["decoder_cfg"], "width": 32, "heads": 2, "mlp_width": 64}}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    more = ["--model", f"local-dir:{tmp_path}", "--force-image-size", "28", "--train-num-samples", "16", *EPS]
    for name, how in (("ddp", []), ("fsdp", ["--fsdp"])):
        argv = flags(squares, vocabulary, tmp_path, name, *more, "--grad-checkpointing", *how, batch=4)
        train(2, [*argv, "--val-frequency", "0"])
    torch.testing.assert_close(losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"), atol=1e-5, rtol=0)
    assert " 72 blocks" in (tmp_path / "fsdp" / "out.log").read_text()  # 48, and 24 of the decoder


def as_if_killed(run: Path, to: Path, newest: str) -> Path:
    """A copy of a run's folder whose newest checkpoint is this one."""
    shutil.copytree(run, to / run.name)
    found = list_checkpoints(to / run.name / "checkpoints")
    for path in found[[path.name for path in found].index(newest) + 1 :]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (to / run.name / "checkpoints" / ".tmp-stage_1_samples_99.dcp").mkdir()
    return to / run.name


STAGES = ["--stage", "16:samples=32", "--stage", "24:samples=16"]


def staged(squares: Path, vocabulary: Path, logs: Path, *more: str, batch: int) -> list[str]:
    # Captions of a sharded model cost more than all else here, and another test has them.
    argv = flags(squares, vocabulary, logs, "run", *AVERAGE, *STAGES, "--carry-optimizer", *more, batch=batch)
    argv += ["--sample-captions", "0"]
    left_out = ("--force-image-size", "--epochs", "--train-num-samples")
    return [word for index, word in enumerate(argv) if word not in left_out and argv[index - 1] not in left_out]


def test_sharded_checkpoints_resume_on_any_number_of_processes(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Four processes, two stages. Oracles: the same run with whole files, bit for bit, and resumed from them."""
    more = ["--fsdp", "--fsdp-hybrid", "2", "--save-every-steps", "2", "--keep-checkpoints", "9", "--fsdp-checkpoint"]
    for kind in ("full", "sharded"):
        train(4, staged(squares, vocabulary, tmp_path / kind, *more, kind, batch=2))
    full, sharded = tmp_path / "full" / "run", tmp_path / "sharded" / "run"
    assert figures(sharded) == figures(full)
    assert [path.name for path in list_checkpoints(sharded / "checkpoints")] == [
        "stage_1_samples_16.dcp", "stage_1.pt", "stage_2.pt",
    ]  # fmt: skip
    file = tmp_path / "converted.pt"
    folder = sharded / "checkpoints" / "stage_1_samples_16.dcp"
    assert ov2(["convert", str(folder), "--to", str(file)]) == 0
    one, two = (torch.load(path, weights_only=True) for path in (file, full / "checkpoints" / "stage_1_samples_16.pt"))
    assert one.keys() == two.keys()
    assert_equal_weights(one["state_dict"], two["state_dict"])
    assert_equal_weights(one["open_clip_ov2_live"]["weights"], two["open_clip_ov2_live"]["weights"])
    for index, state in two["optimizer"]["state"].items():
        assert_equal_weights(one["optimizer"]["state"][index], state)
    assert one[RESUME_KEY].keys() == two[RESUME_KEY].keys()

    argv, resumed = staged(squares, vocabulary, tmp_path / "killed", *more, "sharded", batch=2), tmp_path / "killed/run"
    ranks = start(argv, 4)
    assert wait_for(lambda: samples_of(resumed) >= 24, ranks)
    for rank in ranks:
        rank.send_signal(9)
    finish(ranks)
    train(4, argv)
    assert figures(resumed) == figures(sharded)
    assert_equal_weights(*(weights(run / "checkpoints" / "stage_2.pt") for run in (resumed, sharded)))
    assert not list((resumed / "checkpoints").glob(".tmp-*"))
    for run, newest, how in ((sharded, "dcp", ["sharded"]), (full, "pt", ["full"])):
        as_if_killed(run, tmp_path / f"two-{newest}", f"stage_1_samples_16.{newest}")
        argv = staged(squares, vocabulary, tmp_path / f"two-{newest}", "--fsdp", "--fsdp-checkpoint", *how, batch=4)
        train(2, [*argv, "--until-stage", "1"])
    assert_equal_weights(*(weights(tmp_path / f"two-{kind}/run/checkpoints/stage_1.pt") for kind in ("dcp", "pt")))


def test_a_signal_saves_shards_and_a_damaged_folder_is_passed_over(
    squares: Path, vocabulary: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of two ranks gets the signal, and all write. Oracle: the folder, read again."""
    more = ["--fsdp", "--fsdp-checkpoint", "sharded", "--train-num-samples", "40000", "--save-every-steps", "2"]
    argv = flags(squares, vocabulary, tmp_path, "run", *more, "--keep-checkpoints", "2", batch=4)
    ranks = start(argv, 2)
    assert wait_for(lambda: samples_of(tmp_path / "run") >= 48, ranks)
    ranks[1].send_signal(15)
    assert [status for status, _ in finish(ranks)] == [INTERRUPTED_STATUS] * 2
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.suffix for path in found] == [".dcp", ".dcp"]
    assert ov2(["eval", str(tmp_path / "run"), "--data", f"{squares}/val/00000.tar"]) == 2
    assert f"make a file of it: ov2 convert {found[-1]} --to FILE.pt" in capfd.readouterr().err
    shard = next(found[-1].glob("__1_*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert ov2(["convert", str(found[-1]), "--to", str(tmp_path / "x.pt")]) == 2
    assert f"{shard}: missing or incomplete" in capfd.readouterr().err
    at = int(found[0].stem.split("_")[-1])
    # On one process nothing is sharded, and it goes on from the shards all the same.
    argv += ["--override", "--val-frequency", "0"]
    end = [*argv, "--batch-size", "8", "--train-num-samples", str(at + 8)]
    assert ov2(["train", *end]) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert f"{shard}: missing or incomplete" in log
    assert f"resuming from {found[0]}" in log
    assert "--fsdp: there is one process" in log


def test_a_part_that_only_its_process_reads_is_passed_over_by_all(
    squares: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """The second process's part, damaged without a change of its size. Oracle: the log."""
    more = ["--fsdp", "--fsdp-checkpoint", "sharded", "--save-every-steps", "1", "--keep-checkpoints", "9"]
    argv = flags(squares, vocabulary, tmp_path, "run", *more, "--train-num-samples", "32", batch=4)
    train(2, argv)
    (tmp_path / "run" / "checkpoints" / "stage_1.pt").unlink()
    folder, newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-2:]
    for part in newest.glob("__1_*"):
        part.write_bytes(bytes(part.stat().st_size))
    train(2, argv)
    log = (tmp_path / "run" / "out.log").read_text()
    assert re.search(rf"{newest} cannot be read .*a part is damaged.* on rank 1: skipped", log)
    assert f"resuming from {folder}" in log


def test_non_finite_steps_end_a_sharded_run(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """A learning rate that overflows float32, as in test_resume.py. Oracle: the last checkpoint is finite."""
    more = ["--fsdp", "--fsdp-checkpoint", "sharded", "--save-every-steps", "1", "--max-bad-steps", "3"]
    more += ["--keep-checkpoints", "99", "--lr", "1e30", "--warmup", "0", "--train-num-samples", "400"]
    done = finish(start(flags(squares, vocabulary, tmp_path, "run", *more, batch=4), 2))
    assert [status for status, _ in done] == [2, 2]
    assert "step left out (1 in a row); its samples here: 0000" in (tmp_path / "run" / "out.log").read_text()
    content = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fsdp-hybrid", "2"], "--fsdp-hybrid without --fsdp: it has no effect"),
        (["--fsdp-checkpoint", "sharded"], "--fsdp-checkpoint sharded without --fsdp: it has no effect"),
        (["--fsdp", "--fsdp-hybrid", "3"], "--fsdp-hybrid 3: does not divide the 4 processes of the run"),
        (["--fsdp", "--ddp-static-graph"], "--ddp-static-graph with --fsdp: it is DDP's"),
        (["--fsdp", "--precision", "bf16"], "--fsdp --precision bf16: expected one of fp32, amp_bf16"),
        (["--fsdp", "--opt", "timm/lamb"], "--fsdp --opt timm/lamb: expected one of adamw"),
        (
            ["--fsdp", "--torchcompile", "--compile-encoder", "whole"],
            "--compile-encoder whole with --fsdp: blocks are gathered one by one",
        ),
        (
            ["--fsdp", "--fsdp-checkpoint", "sharded", "--save-most-recent"],
            "--save-most-recent with --fsdp-checkpoint sharded: it leads to a file",
        ),
        (
            ["--fsdp", "--fsdp-checkpoint", "sharded", "--remote-sync", "memory://runs"],
            "--remote-sync with --fsdp-checkpoint sharded: it copies files",
        ),
        (
            ["--fsdp", "--fsdp-checkpoint", "sharded", "--lora-rank", "2"],
            "--lora-rank with --fsdp-checkpoint sharded: checkpoints have adapters",
        ),
    ],
)
def test_what_does_not_go_together_is_said(squares: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*data_flags(squares), "--model", "ov2-vit-nano-8", *more], world_size=4, gpu=True)

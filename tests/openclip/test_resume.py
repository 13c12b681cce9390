"""A run that is interrupted and started again is the run that was not. Oracle: the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import open_clip
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import (
    TINY_MODEL,
    Killer,
    assert_equal_weights,
    data_flags,
    figures,
    finish,
    results,
    samples_of,
    start,
    start_ranks,
    wait_for,
    weights,
)

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.errors import INTERRUPTED_STATUS
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer, text_cfg_for
from open_clip_ov2.train.checkpoint import RESUME_KEY, list_checkpoints


def common(squares: Path, vocabulary: Path | None, logs: Path) -> list[str]:
    flags = [*data_flags(squares), "--logs", str(logs), "--name", "run", "--log-every-n-steps", "1"]
    if vocabulary is not None:
        flags += ["--model", TINY_MODEL, "--force-context-length", "12", "--tokenizer", str(vocabulary)]
    return flags


def without(flags: list[str], *names: str) -> list[str]:
    """Flags of one value left out."""
    return [word for index, word in enumerate(flags) if word not in names and flags[index - 1] not in names]


def two_stages(squares: Path, vocabulary: Path | None, logs: Path) -> list[str]:
    flags = without(common(squares, vocabulary, logs), "--epochs", "--train-num-samples")
    return [*flags, "--stage", "16:samples=48,lr=1e-3", "--stage", "24:samples=32,lr=5e-4,keep-ratio=0.5"]


def as_if_killed_after(run: Path, checkpoint: Path, logs: Path) -> Path:
    """A run's folder as SIGKILL leaves it some time after this checkpoint was written: later records, no later file."""
    folder = logs / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "open_clip_config.json", "results.jsonl", "out.log", "vocab.txt"):
        if (run / name).exists():
            shutil.copy(run / name, folder / name)
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"kind": "train", "samples_seen": 9')  # torn
    shutil.copytree(run / "tensorboard", folder / "tensorboard", dirs_exist_ok=True)
    order = list_checkpoints(run / "checkpoints")
    for path in order[: order.index(checkpoint) + 1]:
        shutil.copy(path, folder / "checkpoints")
    (folder / "checkpoints" / ".tmp-stage_9.pt").write_bytes(b"torn")
    return folder


CASES = {
    "two stages, tars in turn": [],
    "two workers, keys, range": [
        "--workers", "2", "--caption-keys", "json:recaption=0.6,txt=0.4", "--keep-ratio", "0.3:0.9",
    ],
    "accumulation": ["--batch-size", "4", "--accum-freq", "2", "--shuffle-buffer", "3"],
    "resampled, moments carried": ["--dataset-resampled", "--workers", "2", "--carry-optimizer"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resumed_after_any_step_it_is_the_same_run(squares: Path, vocabulary: Path, tmp_path: Path, case: str) -> None:
    more = [*CASES[case], "--save-every-steps", "1", "--keep-checkpoints", "99", "--report-to", "tensorboard"]
    assert ov2(["train", *two_stages(squares, vocabulary, tmp_path / "whole"), *more]) == 0
    whole = tmp_path / "whole" / "run"
    files = list_checkpoints(whole / "checkpoints")
    assert [path.name for path in files][-2:] == ["stage_2_samples_72.pt", "stage_2.pt"]
    assert len(files) == 10  # 6 steps, then 4
    for index in random.Random(case).sample(range(9), 3):
        logs = tmp_path / str(index)
        folder = as_if_killed_after(whole, files[index], logs)
        assert ov2(["train", *two_stages(squares, vocabulary, logs), *more]) == 0
        assert figures(folder) == figures(whole)
        assert_equal_weights(weights(folder / "checkpoints" / "stage_2.pt"), weights(files[-1]))
        assert not list((folder / "checkpoints").glob(".tmp-*"))
        board = EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        steps = [event.step for event in board.Scalars("train/loss")]
        assert steps == sorted(set(steps)) == [8 * n for n in range(1, 11)]
        assert [event.value for event in board.Scalars("run/stage")] == [1.0] * 6 + [2.0] * 4


def test_elastic_runs_go_on_alike_with_other_numbers(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Four batches to accumulate, and two data workers; oracle: the uninterrupted run's losses, to rounding.

    scripts/kill_soak.py --elastic does it with real processes, killed, on one and on two.
    """
    more = [
        "--elastic",
        "2x2",
        "--seed",
        "4000000000",
        "--shuffle-buffer",
        "5",
        "--keep-ratio",
        "0.3:0.9",
        "--save-every-steps",
        "1",
    ]
    more += ["--keep-checkpoints", "99", "--caption-keys", "json:recaption=0.6,txt=0.4", "--global-batch", "8"]
    assert ov2(["train", *two_stages(squares, vocabulary, tmp_path / "whole"), *more]) == 0
    whole, rows = tmp_path / "whole" / "run", dict[Path, list[tuple[int, float]]]()
    (whole / "tensorboard").mkdir()
    files = list_checkpoints(whole / "checkpoints")
    folder = as_if_killed_after(whole, files[3], tmp_path / "other")
    flags = [*two_stages(squares, vocabulary, tmp_path / "other"), *more, "--batch-size", "2", "--workers", "2"]
    assert ov2(["train", *flags]) == 0
    for run in (whole, folder):
        rows[run] = [(row["samples_seen"], row["loss"]) for row in results(run, "train")]
    assert len(rows[folder]) == 10
    for (seen, loss), (other_seen, other_loss) in zip(rows[whole], rows[folder], strict=True):
        assert seen == other_seen
        assert other_loss == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("model", ["coca_tiny", "clip_tiny"])
def test_baselines_go_on_too(squares: Path, baselines: Path, vocabulary: Path, tmp_path: Path, model: str) -> None:
    """Learned position tables, the stock step with accumulation, two resolutions."""
    more = ["--model", f"local-dir:{baselines / model}", "--batch-size", "4", "--accum-freq", "2"]
    more += ["--tokenizer", str(vocabulary), "--force-context-length", "12"]
    more += ["--save-every-steps", "1", "--keep-checkpoints", "99"]

    def flags(logs: Path) -> list[str]:
        return [
            *without(two_stages(squares, None, logs), "--stage"),
            "--stage",
            "16:samples=24",
            "--stage",
            "24:samples=24",
        ]

    assert ov2(["train", *flags(tmp_path / "whole"), *more]) == 0
    whole = tmp_path / "whole" / "run"
    (whole / "tensorboard").mkdir(exist_ok=True)
    files = list_checkpoints(whole / "checkpoints")
    table = "visual.positional_embedding"
    assert [len(weights(path)[table]) for path in (files[0], files[-1])] == [1 + 2 * 2, 1 + 3 * 3]
    for index in (1, 4):
        folder = as_if_killed_after(whole, files[index], tmp_path / str(index))
        assert ov2(["train", *flags(tmp_path / str(index)), *more]) == 0
        assert figures(folder) == figures(whole)
        assert_equal_weights(weights(folder / "checkpoints" / "stage_2.pt"), weights(files[-1]))


def test_each_stages_checkpoint_is_open_clips(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: plain OpenCLIP's create_model, and its own optimizer-free fine-tuning call, a forward pass."""
    assert ov2(["train", *two_stages(squares, vocabulary, tmp_path), "--model", "ov2-vit-nano-8"]) == 0
    words = text_cfg_for(str(vocabulary), 12)
    for stage, size in ((1, 16), (2, 24)):
        path = str(tmp_path / "run" / "checkpoints" / f"stage_{stage}.pt")
        model, _, preprocess = open_clip.create_model_and_transforms(
            "ov2-vit-nano-8", path, force_image_size=size, text_cfg=words
        )
        assert torch.equal(model.text_decoder.lm_head.weight, weights(Path(path))["text_decoder.lm_head.weight"])
        tokens = WordPieceTokenizer(vocabulary, 12)(["a red square"])
        model(torch.randn(1, 3, size, size), tokens)["logits"].sum().backward()
        assert f"size={size}" in str(preprocess)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = two_stages(squares, vocabulary, tmp_path)
    assert ov2(["train", *flags, "--until-stage", "1"]) == 0
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-1] == "stage_1.pt"
    assert ov2(["train", *flags]) == 0
    before = figures(run)
    assert ov2(["train", *flags]) == 0
    assert "nothing left to do" in (run / "out.log").read_text()
    assert figures(run) == before
    capsys.readouterr()
    assert ov2(["train", *flags, "--wd", "0.5"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stage 1 wd: 0.2 before, 0.5 now; stage 2 wd: 0.2 before, 0.5 now" in error
    assert "--override" in error
    assert ov2(["train", *flags, "--wd", "0.5", "--override", "--workers", "1"]) == 0
    longer = [*without(flags, "--stage"), "--stage", "16:samples=48,lr=1e-3", "--stage", "24:samples=64,lr=5e-4"]
    assert ov2(["train", *longer, "--override"]) == 2
    assert "stage 2 is finished" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert ov2(["train", *without(flags, "--name"), "--name", "other"]) == 2
    assert "is not a run of ov2" in capsys.readouterr().err
    (tmp_path / "other" / "run.json").write_text("{}")
    assert ov2(["train", *without(flags, "--name"), "--name", "other"]) == 2
    assert 'run.json: not written by `ov2 train` (it has no "config")' in capsys.readouterr().err


def test_override_of_the_number_of_epochs_is_told_where_it_cannot_be(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer epochs than are done within a stage; more of a stage that is finished, its samples counted by sizes.json.
    Oracle: the exit status, which is not 0, and no new file."""
    shards = tmp_path / "shards"
    shutil.copytree(squares / "train", shards)
    (shards / "sizes.json").write_text(json.dumps({path.name: 8 for path in sorted(shards.glob("*.tar"))[:1]}))
    flags = without(
        common(squares, vocabulary, tmp_path), "--train-num-samples", "--epochs", "--train-data", "--val-data"
    )
    flags += ["--force-image-size", "16", "--train-data", f"{shards}/00000.tar", "--override"]
    assert ov2(["train", *flags, "--epochs", "2"]) == 0
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["stage_1_samples_8.pt", "stage_1.pt"]
    assert ov2(["train", *flags, "--epochs", "3"]) == 2
    assert "stage 1 is finished" in capsys.readouterr().err
    checkpoints[1].unlink()
    assert ov2(["train", *flags, "--epochs", "1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "epoch 1 of stage 1 is done, and --epochs is 1, so nothing was trained" in error
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == checkpoints[:1]


def _train_with_time_up_once(*flags: str) -> int:
    from open_clip_ov2.openclip.run.stage_progress import StageProgress

    def time_is_up(self: StageProgress) -> bool:  # by the clock of rank 0, after the first step alone
        return self._session.rank == 0 and self.steps_done == 1

    StageProgress._save_time_is_up = time_is_up  # type: ignore[method-assign]
    return ov2(["train", *flags])


def test_a_checkpoint_due_at_the_step_before_an_epochs_last_is_written(
    squares: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """Ranks agree a step late. Oracle: epochs of two steps, and the clock has run out after the first: saved at the
    epoch's end, though --save-frequency asks for nothing."""
    flags = [*without(common(squares, vocabulary, tmp_path), "--epochs", "--val-data"), "--force-image-size", "16"]
    done = finish(start_ranks(_train_with_time_up_once, [*flags, "--epochs", "2", "--save-frequency", "0"], 2))
    assert [status for status, _ in done] == [0, 0], done
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["stage_1_samples_32.pt", "stage_1.pt"]


def test_the_same_command_finds_its_run_without_a_name(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: the folders made. What is trained makes the name; how it is watched does not."""
    flags = without(two_stages(squares, vocabulary, tmp_path), "--name")
    for more in ([], ["--workers", "1", "--save-every-steps", "5"], ["--seed", "1"]):
        assert ov2(["train", *flags, *more, "--until-stage", "1"]) == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stop", ["SIGUSR2", "SIGTERM"])
def test_a_signal_to_one_rank_saves_all_together(squares: Path, vocabulary: Path, tmp_path: Path, stop: str) -> None:
    """Two processes, two workers each; the signal goes to rank 1, and to its data workers too."""
    flags = [
        *two_stages(squares, vocabulary, tmp_path),
        "--workers",
        "2",
        "--stage",
        "32:samples=4000",
        "--batch-size",
        "4",
    ]
    ranks = start(flags, 2)
    run = tmp_path / "run"
    assert wait_for(lambda: samples_of(run) >= 104, ranks)
    group = os.getpgid(ranks[1].pid)
    os.killpg(group, getattr(signal, stop))
    done = finish(ranks)
    assert [status for status, _ in done] == [INTERRUPTED_STATUS] * 2, done
    assert f"saved at {samples_of(run)} samples" in done[1][1].replace(",", "")
    newest = torch.load(list_checkpoints(run / "checkpoints")[-1], weights_only=True)[RESUME_KEY]
    assert newest["samples_seen"] == samples_of(run)
    assert (newest["stage"], len(newest["ranks"])) == (3, 2)


def test_killed_at_random_moments_it_ends_in_the_same_weights(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """SIGKILL to either rank of 2, with 2 workers each, 10 times over 2 stages; some while a checkpoint is written."""

    def flags(logs: Path) -> list[str]:
        stages = ["--stage", "16:samples=480,lr=1e-3", "--stage", "24:samples=480,lr=5e-4"]
        return [
            *without(two_stages(squares, vocabulary, logs), "--stage"), *stages, "--workers", "2", "--batch-size", "4",
            "--save-every-steps", "2", "--sample-captions", "0", "--caption-keys", "json:recaption,txt",
        ]  # fmt: skip

    done = finish(start(flags(tmp_path / "whole"), 2))
    assert [status for status, _ in done] == [0, 0], done
    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    killer = Killer(run, limit=10, seed=0)
    while not (run / "checkpoints" / "stage_2.pt").exists():
        killer.start_and_kill(flags(tmp_path / "killed"))
    assert killer.kills == 10
    assert killer.while_writing >= 3
    assert figures(run) == figures(whole)
    assert_equal_weights(*(weights(path / "checkpoints" / "stage_2.pt") for path in (run, whole)))


def test_another_number_of_processes_and_workers_goes_on(
    squares: Path, vocabulary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes stop in the middle of an epoch, one continues: the log says that the order differs."""
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-num-samples", "4000"]
    ranks = start([*flags, "--batch-size", "4", "--workers", "2"], 2)
    assert wait_for(lambda: samples_of(tmp_path / "run") >= 40, ranks)
    ranks[0].send_signal(signal.SIGUSR2)
    assert [status for status, _ in finish(ranks)] == [INTERRUPTED_STATUS] * 2
    at = samples_of(tmp_path / "run")
    more = start([*flags, "--batch-size", "8", "--workers", "1"], 1)
    assert wait_for(lambda: samples_of(tmp_path / "run") >= at + 40, more)
    more[0].send_signal(signal.SIGTERM)
    assert finish(more)[0][0] == INTERRUPTED_STATUS
    assert "their order differs" in (tmp_path / "run" / "out.log").read_text()
    seen = [row["samples_seen"] for row in results(tmp_path / "run", "train")]
    assert seen == sorted(set(seen))


def test_non_finite_steps_are_left_out_and_then_end_the_run(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that overflows float32 makes real NaNs. Oracle: the last checkpoint before them is finite."""
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-num-samples", "400"]
    flags += ["--save-every-steps", "1", "--max-bad-steps", "3", "--keep-checkpoints", "99"]
    assert ov2(["train", *flags, "--lr", "1e30", "--warmup", "0"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row had a non-finite loss or gradient" in error
    assert "stage_1_samples_" in error
    log = (tmp_path / "run" / "out.log").read_text()
    assert "step left out (1 in a row); its samples here: 0000" in log
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert all(torch.isfinite(value).all() for value in weights(newest).values())


def test_a_disk_that_fills_up_does_not_end_the_run(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system with room for the logs and one checkpoint: all steps are made, and the end tells the truth."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        flags = [*common(squares, vocabulary, disk), "--force-image-size", "16", "--train-num-samples", "48"]
        assert ov2(["train", *flags, "--save-every-steps", "1", "--keep-checkpoints", "99"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert "training is over after 48 samples, but the checkpoint was not written (" in last
        assert "the same command resumes from" in last
        log = (disk / "run" / "out.log").read_text()
        assert "CHECKPOINT NOT WRITTEN" in log
        assert "No space left on device" in log
        assert samples_of(disk / "run") == 48
        kept = list_checkpoints(disk / "run" / "checkpoints")
        assert kept
        for path in kept:
            assert weights(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_signal_claims_no_checkpoint_that_was_not_written(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """The folder of checkpoints goes while the run is at work. Oracle: what lies on the disk."""
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-num-samples", "40000"]
    (rank,) = start(flags, 1)
    assert wait_for(lambda: samples_of(tmp_path / "run") >= 40, [rank])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    rank.send_signal(signal.SIGTERM)
    ((status, error),) = finish([rank])
    last = error.strip().splitlines()[-1]
    assert status == 2
    assert "SIGTERM: stopped at" in last
    assert "the checkpoint was not written (No such file or directory" in last or "[Errno 2]" in last
    assert "resumes from the beginning" in last
    assert "saved at" not in error
    assert "Free some space" not in error
    assert "The run continues; there is no checkpoint yet." in (tmp_path / "run" / "out.log").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_data_worker_is_told(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-num-samples", "40000"]
    (rank,) = start([*flags, "--workers", "2"], 1)
    assert wait_for(lambda: samples_of(tmp_path / "run") >= 40, [rank])
    children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    ((status, error),) = finish([rank])
    assert status == 2
    assert "a data worker died" in error.splitlines()[-1]


def test_the_run_file_says_how(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    flags = two_stages(squares, vocabulary, tmp_path)
    assert ov2(["train", *flags, "--until-stage", "1"]) == 0
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["command"] == ["ov2", "train", *flags, "--until-stage", "1"]
    assert about["versions"]["open_clip_torch"].startswith("3.3")
    assert [stage["global_batch"] for stage in about["config"]["stages"]] == [8, 8]


def test_a_stalled_shard_is_named(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """A pipe that gives a real tar and then does not end for a while."""
    shard = f"pipe:cat {squares}/train/00000.tar; sleep 3"
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-data", shard]
    flags += ["--train-num-samples", "16", "--stall-warning", "0.5", "--dataset-type", "webdataset"]
    assert ov2(["train", *without(flags, "--val-data")]) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "sleep 3" in next(line for line in log.splitlines() if "no batch for" in line)


def test_epochs_of_one_step_stop_and_save_too(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """The last step of an epoch is the only one there is."""
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--train-num-samples", "8"]
    flags += ["--epochs", "9000", "--save-every-steps", "3", "--save-frequency", "0", "--keep-checkpoints", "2"]
    (rank,) = start(without(flags, "--val-data"), 1)
    assert wait_for(lambda: len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2, [rank])
    steps = [int(path.stem.split("_")[-1]) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert [samples % 24 for samples in steps] == [0, 0]
    rank.send_signal(signal.SIGTERM)
    assert finish([rank])[0][0] == INTERRUPTED_STATUS


def test_a_validation_alone_leaves_a_training_run_as_it_is(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = two_stages(squares, vocabulary, tmp_path)
    assert ov2(["train", *flags]) == 0
    before = (tmp_path / "run" / "run.json").read_text(), figures(tmp_path / "run")
    alone = without(common(squares, vocabulary, tmp_path), "--train-data", "--train-num-samples")
    assert ov2(["train", *alone]) == 2
    assert "another --name" in capsys.readouterr().err
    assert ((tmp_path / "run" / "run.json").read_text(), figures(tmp_path / "run")) == before


def test_a_run_killed_before_its_first_file_was_whole_begins(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-run.json").write_text("{")
    assert ov2(["train", *two_stages(squares, vocabulary, tmp_path), "--until-stage", "1"]) == 0


def test_a_recipes_train_table_reaches_the_runs_own_options(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: validations at each multiple, and the best of them named."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f'model = "{TINY_MODEL}"\n[train]\nval-every-samples = 16\nsample-captions = 0\n'
        "[[stage]]\nresolution = 16\nsamples = 40\nlr = 1e-3\n"
    )
    flags = without(common(squares, vocabulary, tmp_path), "--epochs", "--train-num-samples", "--model", "--lr")
    assert ov2(["train", "--recipe", str(recipe), *flags]) == 0
    rows = results(tmp_path / "run", "val")
    assert [row["samples_seen"] for row in rows] == [16, 32, 40]
    best = min(rows, key=lambda row: row["caption_loss"])
    found = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert found["caption_loss"] == best["caption_loss"]


@pytest.mark.parametrize("opt", ["adamw", "timm/adamw"])
def test_override_of_the_optimizers_flags_is_obeyed(squares: Path, vocabulary: Path, tmp_path: Path, opt: str) -> None:
    """Oracle: the optimizer's own groups in the next checkpoint; those of one weight decay keep none."""
    flags = [*common(squares, vocabulary, tmp_path), "--force-image-size", "16", "--opt", opt, "--val-frequency", "0"]
    flags += ["--save-every-steps", "1", "--keep-checkpoints", "9", "--beta1", "0.9", "--beta2", "0.95"]
    assert ov2(["train", *flags]) == 0
    folder = tmp_path / "run" / "checkpoints"
    (folder / "stage_1.pt").unlink()
    changed = {"--wd": "0.5", "--beta1": "0.8", "--eps": "1e-5"}
    assert ov2(["train", *flags, *(word for pair in changed.items() for word in pair), "--override"]) == 0
    groups = torch.load(folder / "stage_1.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.8, 0.95), 1e-5)}


def test_override_of_the_model_is_one_line(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between stages and within one."""
    flags = two_stages(squares, vocabulary, tmp_path)
    assert ov2(["train", *flags, "--until-stage", "1", "--save-every-steps", "4", "--val-frequency", "0"]) == 0
    changed = [*flags, "--override", "--fusion", "cross_attn", "--val-frequency", "0"]
    for _ in range(2):
        capsys.readouterr()
        assert ov2(["train", *changed]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "--override: another model than before: " in error
        (tmp_path / "run" / "checkpoints" / "stage_1.pt").unlink(missing_ok=True)

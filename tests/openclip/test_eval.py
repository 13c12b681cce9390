"""`ov2 eval` and `--eval`. Oracles: another batch size, two processes, the sums written out, images alone."""

from __future__ import annotations

import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from eval_worker import evaluate
from square_shards import COLORS, write_square_shards
from training import NANO, data_flags, finish, results, start_ranks

import open_clip_ov2 as ov2_python
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core import CaptionLoss
from open_clip_ov2.core.packing import pack_captions
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.options import options_of
from open_clip_ov2.evaluate.tasks import TASKS as ALL_TASKS
from open_clip_ov2.evaluate.tasks import Task
from open_clip_ov2.openclip.models.open_evaluated import open_eval_model
from open_clip_ov2.openclip.models.open_model import open_model
from open_clip_ov2.openclip.run.baselines import init_coca_head

TASKS = (
    "caption-loss,shuffled-loss,read-text,likelihood,likelihood-retrieval,linear-probe,knn,attentive-probe,keep-ratios,"
    "image-sizes,read-probe"
)


@pytest.fixture(scope="module")
def run(squares: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    flags = [*data_flags(squares, 24), "--logs", str(folder), "--name", "run", "--sample-captions", "0"]
    asked = f"--tasks knn --data {squares}/val/00000.tar --train-data {squares}/train/00000.tar --label-key json:kind"
    flags += ["--tokenizer", str(vocabulary), "--eval", asked]
    flags += ["--val-every-samples", "8", "--eval-every-samples", "16"]
    assert ov2(["train", *NANO, *flags]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def baseline_models(baselines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and CoCa with weights, as OpenCLIP's `local-dir:` has them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip_tiny", "coca_tiny"):
        (folder / name).mkdir()
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{baselines / name}", load_weights=False)
        init_coca_head(model)  # which OpenCLIP leaves as the memory was
        torch.save(model.state_dict(), folder / name / "open_clip_pytorch_model.bin")
        (folder / name / "open_clip_config.json").write_text((baselines / name / "open_clip_config.json").read_text())
    return folder


def flags_of(squares: Path, *more: str) -> list[str]:
    return [
        "--data", f"{squares}/val/00000.tar", "--train-data", f"{squares}/train/{{00000..00001}}.tar",
        "--label-key", "json:kind", "--group-by", "json:kind", "--image-sizes", "16,24",
        "--read-samples", "64", "--read-seeds", "1", "--read-width", "32", "--read-layers", "1", *more,
    ]  # fmt: skip


def evaluated(model: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert ov2(["eval", str(model), *flags, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal but for the rounding of sums in another order; the way to a minimum may be longer by it, and end early."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"converged"}:
            assert_close(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), where
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def whole(run: Path, squares: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluated(run, tmp_path_factory.mktemp("whole") / "e.json", *flags_of(squares, "--tasks", TASKS))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_changes_nothing(
    run: Path, squares: Path, whole: dict[str, Any], tmp_path: Path, batch_size: int
) -> None:
    flags = flags_of(squares, "--tasks", TASKS, "--batch-size", str(batch_size))
    assert_close(evaluated(run, tmp_path / "e.json", *flags), whole)


def test_two_processes_change_nothing(run: Path, squares: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    argv = [str(run), *flags_of(squares, "--tasks", TASKS, "--batch-size", "3"), "--out", str(tmp_path / "e.json")]
    done = finish(start_ranks(evaluate, [*argv, "--device", "cpu"], 2))
    assert [status for status, _ in done] == [0, 0], done
    assert_close(json.loads((tmp_path / "e.json").read_text()), whole)


def test_shuffled_loss_written_out(run: Path, squares: Path, whole: dict[str, Any]) -> None:
    """Oracle: one batch, its pictures rolled by one, through the model itself."""
    from open_clip_ov2.data.captions import parse_caption_keys
    from open_clip_ov2.data.loader import EvalLoader
    from open_clip_ov2.data.shards import WebDatasetSource
    from open_clip_ov2.evaluate.caption_loss import eval_kept_idx

    opened = open_model(run)
    source = WebDatasetSource((f"{squares}/val/00000.tar",))
    keys = parse_caption_keys("txt")
    loader = EvalLoader(source, opened.preprocess, opened.tokenizer, batch_size=10, num_workers=0, caption_keys=keys)
    (batch,) = loader
    captions = pack_captions(batch.texts_BL, opened.model.text_config.eos_id, 1)
    for task, images in (("caption-loss", batch.images_BCHW), ("shuffled-loss", batch.images_BCHW.roll(1, dims=0))):
        kept = eval_kept_idx(opened.model, batch.keys)
        with torch.no_grad():
            sums = opened.model(images, kept_idx=kept, captions=captions, caption_loss=CaptionLoss())
        assert whole[task]["caption_loss"] == pytest.approx(float(sums.nll / sums.num_targets), rel=1e-5)


def test_caption_loss_by_kind(run: Path, squares: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    """Oracle: the same task on a tar of one kind alone."""
    found = whole["caption-loss"]["by_kind"]
    assert set(found) == set(COLORS)
    with tarfile.open(squares / "val" / "00000.tar") as tar, tarfile.open(tmp_path / "red.tar", "w") as out:
        members = {member.name: (member, tar.extractfile(member).read()) for member in tar}  # type: ignore[union-attr]
        for name, (member, data) in members.items():
            if json.loads(members[f"{Path(name).stem}.json"][1])["kind"] == "red":
                out.addfile(member, io.BytesIO(data))
    alone = evaluated(run, tmp_path / "e.json", "--data", f"{tmp_path}/red.tar", "--tasks", "caption-loss")
    assert_close(found["red"], {key: alone["caption-loss"][key] for key in found["red"]})
    assert found["red"]["num_samples"] < whole["caption-loss"]["num_samples"]


def test_every_caption_is_a_reference(run: Path, squares: Path) -> None:
    """Oracle: a caption that is the second reference word for word scores 1."""
    pytest.importorskip("pycocoevalcap")
    flags = f"--data {squares}/val/00000.tar --caption-keys json:recaption --group-by json:kind"
    job = EvalJob(open_eval_model(str(run), torch.device("cpu")), options_of(flags, "here"))
    rows, _ = job.generated
    assert rows[0].true.startswith("one ")  # what it is shown with is the first
    for index, row in rows.items():
        rows[index] = row._replace(generated=f"a square that is {row.kind}")
    scores = ALL_TASKS["caption"].compute(job)
    assert scores["pictures"] == len(rows) == 10
    assert (scores["bleu4"], scores["rouge_l"]) == (pytest.approx(1), pytest.approx(1))


def test_clip_and_coca_do_what_they_can(
    baseline_models: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = evaluated(baseline_models / "clip_tiny", tmp_path / "clip.json", *flags_of(squares))
    assert {"linear-probe", "knn", "attentive-probe", "zero-shot", "retrieval", "image-sizes"} <= clip.keys()
    assert not {"caption-loss", "read-text"} & clip.keys()
    assert "caption-loss: left out" in capsys.readouterr().err
    coca = evaluated(baseline_models / "coca_tiny", tmp_path / "coca.json", *flags_of(squares, "--seq-len", "8"))
    assert {"linear-probe", "caption-loss", "read-text", "likelihood", "zero-shot"} <= coca.keys()
    assert 0 < coca["caption-loss"]["caption_loss"] < 20


def test_all_continues_where_a_task_cannot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures without captions and with numbers for labels: a line for each task that needs captions or names."""
    from PIL import Image

    for number in (0, 1):
        (tmp_path / "set" / str(number)).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (30, 30), ("red", "blue")[number]).save(tmp_path / "set" / str(number) / f"{index}.png")
    flags = ["--data", str(tmp_path / "set"), "--train-data", str(tmp_path / "set")]
    found = evaluated(run, tmp_path / "e.json", *flags)
    assert {"linear-probe", "knn", "attentive-probe"} <= found.keys()
    message = capsys.readouterr().err
    assert "likelihood: left out, the data's labels are numbers" in message
    assert "caption-loss: left out" in message


def test_what_cannot_be_used_is_named(run: Path, tmp_path: Path) -> None:
    """Every key, however many there are; and a kind that the terminal might take for markup."""
    import webdataset as wds
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(picture, "png")
    with wds.TarWriter(str(tmp_path / "set.tar")) as tar:
        for index in range(12):
            image = b"no picture" if index < 8 else picture.getvalue()
            text = "" if index == 8 else "a red square"
            about = json.dumps({"kind": "[/b]" if index % 2 else "[plain]"}).encode()
            tar.write({"__key__": f"s{index:02}", "png": image, "txt": text, "json": about})
    flags = ["--data", f"{tmp_path}/set.tar", "--group-by", "json:kind", "--seq-len", "4"]
    found = evaluated(run, tmp_path / "e.json", *flags, "--tasks", "caption-loss,read-text,keep-ratios")
    expected = {"undecodable image": [f"s{index:02}" for index in range(8)], "empty caption": ["s08"]}
    assert found["caption-loss"]["skipped_samples"] == expected
    assert found["read-text"]["skipped_samples"] == expected
    assert found["keep-ratios"]["by_keep_ratio"]["1"]["skipped_samples"] == expected
    assert set(found["caption-loss"]["by_kind"]) == {"[/b]", "[plain]"}


def test_python_gives_what_the_command_writes(run: Path, squares: Path, tmp_path: Path) -> None:
    """Oracle: the file of `ov2 eval` with the same flags; lists and paths as Python has them."""
    flags = ["--tasks", "caption-loss,knn,keep-ratios", "--keep-ratios", "0.5,1"]
    written = evaluated(run, tmp_path / "e.json", *flags_of(squares, *flags))
    data = {"data": f"{squares}/val/00000.tar", "train_data": f"{squares}/train/{{00000..00001}}.tar"}
    places = {"label_key": "json:kind", "group_by": "json:kind"}
    shown: list[str] = []
    found = ov2_python.evaluate(
        run, tasks=["caption-loss", "knn", "keep-ratios"], keep_ratios=[0.5, 1], device="cpu", **data, **places,
        done=lambda name, results: shown.append(ALL_TASKS[name].line(results[name], results)),
    )  # fmt: skip
    assert {"checkpoint": written["checkpoint"], "data": data["data"], **found} == written
    assert len(shown) == 3
    with pytest.raises(UserError, match="evaluation: unknown key 'trian_data'; did you mean train-data"):
        ov2_python.evaluate(run, data=data["data"], trian_data="x")


def test_python_captions_what_the_command_captions(
    run: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the lines of `ov2 caption`; and a sheet of them."""
    tar, sheet = f"{squares}/val/00000.tar", tmp_path / "sheet.png"
    argv = ["caption", tar, "--checkpoint", str(run), "--limit", "3", "--seq-len", "6", "--device", "cpu"]
    assert ov2([*argv, "--out", str(sheet)]) == 0
    lines = capsys.readouterr().out.splitlines()
    captions = ov2_python.caption(run, [tar], seq_len=6, device="cpu")
    found = [f"{picture.name}\t{text}" for picture, text in islice(captions, 3)]
    assert [*found, f"contact sheet: {sheet}"] == lines
    assert sheet.is_file()


def test_shuffling_is_told_in_a_sentence() -> None:
    """By hand."""
    loss = {"caption_loss": 2.0, "perplexity": 7.4}
    line = ALL_TASKS["shuffled-loss"].line
    expected = "4.600 nats per token. Shuffling the images costs 2.600 nats per token, so captions depend on the image."
    assert line({"caption_loss": 4.6}, {"caption-loss": loss}) == expected
    assert "hardly depend" in line({"caption_loss": 2.001}, {"caption-loss": loss})
    assert line({"caption_loss": 4.6}, {}) == "4.600 nats per token"


def test_a_task_needs_a_line() -> None:
    """Property of the dataclass: what is computed cannot stay unprinted."""
    with pytest.raises(TypeError, match="line"):
        Task(compute=lambda job: {}, needs=("features",))  # type: ignore[call-arg]


def test_what_is_done_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set of one picture has no other one to shuffle with; and what can be seen at once is reported at once."""
    write_square_shards(tmp_path, 1, 1)
    flags = ["--data", f"{tmp_path}/00000.tar", "--out", str(tmp_path / "e.json"), "--tasks"]
    assert ov2(["eval", str(run), *flags, "caption-loss,shuffled-loss"]) == 2
    assert "needs at least two samples" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["caption-loss"]["num_samples"] == 1
    (tmp_path / "e.json").unlink()
    assert ov2(["eval", str(run), *flags, "caption-loss,likelihood"]) == 2
    assert "--label-key must be given" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


def test_sizes_of_labelled_pictures(run: Path, tmp_path: Path) -> None:
    """Without captions there is k-NN alone. Oracle: the task by itself, at the model's own size."""
    from PIL import Image

    for index, name in enumerate(("red", "blue")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for place in range(3):
            Image.new("RGB", (30, 30 + place), name).save(tmp_path / "set" / name / f"{index}{place}.png")
    flags = ["--data", f"{tmp_path}/set", "--train-data", f"{tmp_path}/set", "--image-sizes", "16,24"]
    found = evaluated(run, tmp_path / "e.json", *flags, "--tasks", "image-sizes,knn")
    assert found["image-sizes"]["by_image_size"]["24"] == {"knn": found["knn"]}
    assert set(found["image-sizes"]["by_image_size"]["16"]) == {"knn"}


def test_results_of_other_tasks_stay(run: Path, squares: Path, tmp_path: Path) -> None:
    for task in ("caption-loss", "knn"):
        found = evaluated(run, tmp_path / "e.json", *flags_of(squares, "--tasks", task))
    assert {"caption-loss", "knn"} <= found.keys()
    other = evaluated(run, tmp_path / "e.json", "--data", f"{squares}/train/00000.tar", "--tasks", "caption-loss")
    assert "knn" not in other


def test_features_of_two_models_are_kept_apart(baseline_models: Path, squares: Path, tmp_path: Path) -> None:
    """Oracle: the same without a cache. Both models have one preprocessing."""
    for name in ("clip_tiny", "coca_tiny", "clip_tiny"):
        flags = flags_of(squares, "--tasks", "linear-probe")
        plain = evaluated(baseline_models / name, tmp_path / "e.json", *flags)
        kept = evaluated(baseline_models / name, tmp_path / "f.json", *flags, "--cache", str(tmp_path / "cache"))
        assert_close(kept["linear-probe"], plain["linear-probe"])
    assert len(list((tmp_path / "cache").glob("pooled-*"))) == 4
    on_disk = evaluated(baseline_models / "clip_tiny", tmp_path / "g.json", *flags, "--feature-disk", str(tmp_path))
    assert_close(on_disk["linear-probe"], plain["linear-probe"])
    (tmp_path / "file").write_text("")
    wrong = ["--feature-disk", str(tmp_path / "file"), "--out", str(tmp_path / "h.json")]
    assert ov2(["eval", str(baseline_models / "clip_tiny"), *flags, *wrong]) == 2  # no folder to lie in


def test_questions_are_asked(run: Path, squares: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    lines = [{"image": "red.png", "question": "a", "answer": "red square", "id": "q1"}]
    lines += [{"image": "gone.png", "question": "a", "answer": "x", "id": "q2"}]
    lines += [{"image": "red.png", "question": "a " * 99, "answer": "x", "id": "q3"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [*flags_of(squares), "--tasks", "questions", "--questions", str(tmp_path / "q.jsonl")]
    found = evaluated(run, tmp_path / "e.json", *flags)["questions"]
    assert found["questions"] == 1
    assert [(one["key"], one["cause"]) for one in found["skipped"]][-1] == ("q3", "question too long")
    assert [one["key"] for one in found["skipped"]] == ["q2", "q3"]
    short = evaluated(run, tmp_path / "s.json", *flags, "--seq-len", "4")["questions"]
    assert short["questions"] == 1


def test_in_the_loop_as_afterwards(run: Path, squares: Path, tmp_path: Path) -> None:
    """Oracle: `ov2 eval` of the checkpoint of the same moment."""
    last = results(run, "val")[-1]
    flags = ["--data", f"{squares}/val/00000.tar", "--train-data", f"{squares}/train/00000.tar"]
    found = evaluated(run, tmp_path / "e.json", *flags, "--label-key", "json:kind", "--tasks", "knn")
    assert last["knn/top1"] == found["knn"]["top1"]


def test_tasks_have_their_own_interval(run: Path) -> None:
    """Every 16 samples and at the end, where the caption loss is measured every 8."""
    rows = results(run, "val")
    assert [row["samples_seen"] for row in rows] == [8, 16, 24]
    assert [row["samples_seen"] for row in rows if "knn/top1" in row] == [16, 24]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "nonsense"], "--tasks: unknown task 'nonsense' (known: caption-loss"),
        (["--tasks", "captoin"], "did you mean caption?"),
        (["--tasks", "knn"], "--train-data must be given"),
        (["--tasks", "questions"], "--questions must be given"),
        (["--batch-size", "0"], "batch-size: 0: expected an integer >= 1"),
        (["--classes", "nowhere.json"], "nowhere.json"),
        (["--keep-ratio", "nan"], "keep-ratio: nan: expected a number > 0 and <= 1"),
        (["--cache", "/dev/null/here"], "cache: /dev/null/here: not a folder that can be written to"),
        (["--data", "x" * 5000, "--tasks", "caption-loss"], "1 of 1 shards do not exist"),
        (["--keep-ratios", "2"], "keep-ratios: 2: expected a number > 0 and <= 1"),
        (["--label-key", "cls,json:label"], "label-key: 'cls,json:label' names 2 places"),
        (["--group-by", "json:"], "group-by: "),
        (["--out", "nowhere/e.json"], "nowhere/e.json: cannot be written"),
    ],
)
def test_slips_are_one_line(
    run: Path, squares: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert ov2(["eval", str(run), "--data", f"{squares}/val/00000.tar", *flags]) != 0
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_task_that_fails_costs_no_training(squares: Path, tmp_path: Path) -> None:
    """A training set of one class, whose fault is found at the first evaluation: the run ends whole, with its losses.
    Tasks come by samples, whatever the epochs' own validation says."""
    write_square_shards(tmp_path / "one", 1, 1)
    flags = [*NANO, *data_flags(squares, 8), "--logs", str(tmp_path), "--name", "run", "--sample-captions", "0"]
    flags += ["--epochs", "3", "--val-frequency", "0", "--eval-every-samples", "16", "--eval"]
    asked = f"--tasks knn --data {squares}/val/00000.tar --train-data {tmp_path}/one/00000.tar --label-key json:kind"
    assert ov2(["train", *flags, asked]) == 0
    assert [row["samples_seen"] for row in results(tmp_path / "run", "val")] == [16, 24]
    assert (tmp_path / "run" / "checkpoints" / "stage_1.pt").is_file()
    assert "training continues without these figures" in (tmp_path / "run" / "out.log").read_text()


def test_a_model_is_asked_what_it_can(baselines: Path, squares: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--model", f"local-dir:{baselines / 'clip_tiny'}", *data_flags(squares, 8), "--logs", str(tmp_path)]
    asked = f"--tasks caption-loss --data {squares}/val/00000.tar"
    assert ov2(["train", *flags, "--eval", asked]) == 2
    assert "has no caption decoder" in capsys.readouterr().err
    assert ov2(["train", *flags, "--eval-every-samples", "8"]) == 2
    assert "--eval-every-samples without --eval: it has no effect" in capsys.readouterr().err


def test_eval_flags_are_checked_before_training(squares: Path, tmp_path: Path, capsys: Any) -> None:
    flags = [*NANO, *data_flags(squares, 16), "--logs", str(tmp_path), "--name", "run"]
    assert ov2(["train", *flags, "--eval", "--tasks knn"]) != 0
    assert "--data" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run" / "checkpoints")

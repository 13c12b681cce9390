"""`ov2 train` end to end on real tars. Oracles are named at each test."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from square_shards import write_square_shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import NANO, TINY, TINY_MODEL, data_flags, finish, results, start, weights

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.core import IGNORE_INDEX, caption_targets
from open_clip_ov2.core import model as core_model
from open_clip_ov2.openclip.models.tokenizer import text_cfg_for


@pytest.fixture(scope="module")
def run(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ordinary run of two epochs, looked at by several tests."""
    logs = tmp_path_factory.mktemp("logs")
    flags = [*NANO, *data_flags(squares), "--epochs", "2", "--report-to", "tensorboard", "--accum-freq", "2"]
    keys = ["--caption-keys", "json:recaption=0.8,txt=0.2", "--sample-captions", "4"]
    assert ov2(["train", *flags, *keys, "--logs", str(logs), "--name", "run"]) == 0
    return logs / "run"


def test_tensorboard_shows_the_panels(run: Path) -> None:
    """Oracle: TensorBoard's own reader; values agree with results.jsonl."""
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    assert scalars >= {
        "train/caption_loss", "train/loss", "train/lr", "train/grad_norm", "throughput/images_per_second",
        "throughput/tokens_per_second", "throughput/data_wait_share", "throughput/mfu", "memory/peak_mb",
        "val/caption_loss", "val/perplexity",
    }  # fmt: skip
    assert board.Tags()["images"] == ["val/captions"]
    events = board.Scalars("val/caption_loss")
    rows = results(run, "val")
    assert [event.step for event in events] == [row["samples_seen"] for row in rows] == [32, 64]
    assert [event.value for event in events] == pytest.approx([row["caption_loss"] for row in rows], rel=1e-6)


def test_the_loss_falls_and_the_weight_is_two(run: Path) -> None:
    """Oracle: an untrained model is at about log V; `loss` is twice `caption_loss` (docs/reference.md)."""
    rows = results(run, "train")
    assert rows[0]["caption_loss"] == pytest.approx(math.log(49408), abs=1.5)
    assert rows[-1]["caption_loss"] < rows[0]["caption_loss"]
    assert rows[0]["loss"] == pytest.approx(2 * rows[0]["caption_loss"])


def test_validation_is_exact(run: Path, squares: Path) -> None:
    """Oracle: the checkpoint loaded by plain OpenCLIP, one forward pass, F.cross_entropy."""
    from open_clip_ov2.data.captions import parse_caption_keys
    from open_clip_ov2.data.loader import EvalLoader
    from open_clip_ov2.data.shards import WebDatasetSource
    from open_clip_ov2.evaluate.caption_loss import eval_kept_idx

    options = {"force_image_size": 24, "force_context_length": 12}
    checkpoint = str(run / "checkpoints" / "stage_1.pt")
    model, _, preprocess = open_clip.create_model_and_transforms("ov2-vit-nano-8", checkpoint, **options)
    tokenizer = open_clip.get_tokenizer("ov2-vit-nano-8", context_length=12)
    keys = parse_caption_keys("json:recaption=0.8,txt=0.2")
    source = WebDatasetSource((f"{squares}/val/00000.tar",))
    (batch,) = EvalLoader(source, preprocess, tokenizer, batch_size=10, num_workers=0, caption_keys=keys)
    out = model.eval()(batch.images_BCHW, batch.texts_BL, kept_idx=eval_kept_idx(model, batch.keys))
    labels = caption_targets(batch.texts_BL, 49407)
    loss = F.cross_entropy(out["logits"].flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    assert results(run, "val")[-1]["caption_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert batch.captions[0] in ("one red square", "a square that is red")


def test_the_folder_is_an_open_clip_model(run: Path) -> None:
    """Oracle: OpenCLIP's own local-dir loader."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run}")
    assert model.visual.image_size == (24, 24)
    assert model.context_length == 12
    assert model.visual.preprocess_cfg["mean"] == [0.485, 0.456, 0.406]


def test_caption_eval_and_plot_commands(
    run: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (50, 30), "red").save(tmp_path / "red.png")
    sheet, curves = tmp_path / "sheet.png", tmp_path / "curves.png"
    inputs = [str(tmp_path / "red.png"), f"{squares}/val/00000.tar"]
    assert ov2(["caption", *inputs, "--checkpoint", str(run), "--out", str(sheet), "--num-beams", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/red.png\t")
    assert len([line for line in lines if "\t" in line]) == 11
    assert Image.open(sheet).width > 400
    flags = ["--data", inputs[1], "--group-by", "json:kind", "--tasks", "caption-loss,shuffled-loss,read-text"]
    assert ov2(["eval", str(run), *flags]) == 0
    found = json.loads((run / "eval.json").read_text())
    assert {"caption-loss", "shuffled-loss", "read-text"} <= set(found)
    kinds = found["read-text"]["by_kind"]
    assert sum(row["pictures"] for row in kinds.values()) == 10
    assert set(kinds) == {"red", "green", "blue", "black"}
    assert ov2(["plot", str(run), "--out", str(curves)]) == 0
    assert Image.open(curves).width > 800


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "amp_bf16", "--grad-clip-norm", "1.0"],
        ["--precision", "bf16", "--grad-checkpointing"],
        ["--lock-image", "--fusion", "cross_attn", "--z-loss", "1e-4", "--label-smoothing", "0.1"],
        ["--keep-ratio", "0.3:0.9", "--eval-keep-ratio", "1.0", "--color-jitter", "--fusion", "causal"],
        ["--dataset-resampled", "--workers", "2", "--force-patch-dropout", "0.25"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_flags_train(squares: Path, vocabulary: Path, tmp_path: Path, flags: list[str]) -> None:
    """Oracle: every trainable weight moved, every frozen one did not, nothing is NaN.

    Without weight decay, which would move what has no gradient.
    """
    fusion = flags[flags.index("--fusion") + 1] if "--fusion" in flags else "prefix"
    text_cfg = text_cfg_for(str(vocabulary), 12)
    model = open_clip.create_model("ov2-vit-nano-8", force_image_size=24, fusion=fusion, text_cfg=text_cfg)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert {"visual.proj", "visual.ln_post.weight"} <= frozen
    if "--lock-image" in flags:
        frozen |= {name for name, _ in model.named_parameters() if name.startswith("visual.")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(before, tmp_path / "before.pt")
    common = ["--logs", str(tmp_path), "--name", "run", "--sample-captions", "2", "--wd", "0"]
    common += ["--pretrained", str(tmp_path / "before.pt"), "--tokenizer", str(vocabulary)]
    assert ov2(["train", *NANO, *data_flags(squares, 16), *common, *flags]) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "stage_1.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    moved = {name for name, value in state.items() if not torch.equal(value, before[name].to(value.dtype))}
    assert moved == before.keys() - frozen
    assert math.isfinite(results(tmp_path / "run", "val")[-1]["caption_loss"])


def test_muon_moves_hidden_matrices_alone(squares: Path, tmp_path: Path, vocabulary: Path) -> None:
    """Oracle: the optimizer's own groups in the checkpoint, and the model's names."""
    flags = [*NANO, *data_flags(squares, 16), "--logs", str(tmp_path), "--name", "run", "--sample-captions", "0"]
    flags += ["--tokenizer", str(vocabulary), "--opt", "timm/muon", "--beta1", "0.9", "--beta2", "0.95"]
    assert ov2(["train", *flags]) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "stage_1.pt", weights_only=True)
    groups, state = saved["optimizer"]["param_groups"], saved["optimizer"]["state"]
    muon = [index for group in groups for index in group["params"] if "momentum_buffer" in state.get(index, {})]
    shapes = {tuple(state[index]["momentum_buffer"].shape) for index in muon}
    words = saved["state_dict"]["text_decoder.lm_head.weight"].shape[0]
    assert (576, 192) in shapes  # query, key and value of a block
    assert not any(words in shape for shape in shapes)
    assert len(shapes) > 3
    assert math.isfinite(results(tmp_path / "run", "val")[-1]["caption_loss"])


def test_compiled_blocks_give_the_same_run(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracles: the same run without --torchcompile; dynamo's own count of the graphs that it has compiled."""
    from torch._dynamo.utils import counters

    counters.clear()
    losses, graphs = [], []
    for name, flags in (("eager", []), ("compiled", ["--torchcompile"])):
        common = [*TINY, *data_flags(squares, 16), "--logs", str(tmp_path), "--keep-ratio", "1.0"]
        common += ["--sample-captions", "0", "--tokenizer", str(vocabulary)]
        assert ov2(["train", *common, "--name", name, *flags]) == 0
        losses.append(results(tmp_path / name, "val")[-1]["caption_loss"])
        graphs.append(counters["stats"]["unique_graphs"])
        keys = torch.load(tmp_path / name / "checkpoints" / "stage_1.pt", weights_only=True)["state_dict"].keys()
        assert not [key for key in keys if "_orig_mod" in key]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert graphs[0] == 0
    assert graphs[1] > 0


def test_the_memory_budget_reaches_the_blocks(
    squares: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a budget does is tested in test_recompute.py."""
    budgets: list[float] = []
    monkeypatch.setattr(core_model, "compile_backend", lambda budget, _: budgets.append(budget) or "eager")
    flags = [*TINY, *data_flags(squares, 16), "--logs", str(tmp_path), "--name", "run", "--sample-captions", "0"]
    flags += ["--tokenizer", str(vocabulary), "--torchcompile", "--activation-memory-budget", "0.25"]
    assert ov2(["train", *flags]) == 0
    assert budgets == [0.25]


def torchrun(flags: list[str], processes: int = 2) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launch, "-m", "open_clip_ov2", "--", "train", *flags], capture_output=True, text=True, timeout=300
    )


def test_two_processes_train_and_validate_alike(run: Path, squares: Path, tmp_path: Path) -> None:
    """Oracle: validation of one checkpoint on one process; the set of 10 does not divide evenly by the batch."""
    logs = ["--logs", str(tmp_path)]
    checkpoint = ["--pretrained", str(run / "checkpoints" / "stage_1.pt")]
    only_val = [*NANO, "--val-data", f"{squares}/val/00000.tar", "--workers", "0", *checkpoint, *logs]
    assert ov2(["train", *only_val, "--name", "one", "--batch-size", "3"]) == 0
    done = torchrun([*NANO, *data_flags(squares), *checkpoint, *logs, "--name", "two", "--lr", "0", "--wd", "0"])
    assert done.returncode == 0, done.stderr[-3000:]
    (one,), (two,) = results(tmp_path / "one", "val"), results(tmp_path / "two", "val")
    assert one["num_samples"] == two["num_samples"] == 10
    assert one["caption_loss"] == pytest.approx(two["caption_loss"], abs=1e-6)


@pytest.mark.parametrize("model", ["coca_tiny", "clip_tiny"])
def test_baselines_run_through_the_stock_step(
    squares: Path, baselines: Path, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle for CoCa's validation loss: one forward pass and F.cross_entropy over real targets."""
    flags = ["--model", f"local-dir:{baselines / model}", *data_flags(squares), "--accum-freq", "2"]
    keys = ["--caption-keys", "json:recaption,txt", "--logs", str(tmp_path), "--name", "run"]
    assert ov2(["train", *flags, *keys]) == 0
    rows, (val,) = results(tmp_path / "run", "train"), results(tmp_path / "run", "val")
    assert rows[-1]["samples_seen"] == 32
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert "image_to_text_R@1" in val
    log = (tmp_path / "run" / "out.log").read_text()
    if model == "clip_tiny":
        assert "fixed:" not in log
        assert "caption_loss" not in val
        return
    assert "fixed: CoCa's decoder head" in log
    assert "val_generative_loss" not in val
    assert val["caption_loss"] == pytest.approx(coca_loss(tmp_path / "run", squares), abs=1e-4)


@pytest.mark.parametrize(
    ("flag", "option"),
    [
        ("--siglip", {"init_logit_bias": -10}),
        ("--force-quick-gelu", {"force_quick_gelu": True}),
        ("--force-custom-text", {"force_custom_text": True}),
    ],
)
def test_a_run_opens_as_what_it_was_trained_as(
    squares: Path, baselines: Path, tmp_path: Path, flag: str, option: dict[str, Any]
) -> None:
    """Its configuration has the flags that change a baseline's model. Oracle: OpenCLIP's factory, as in `main`."""
    from open_clip_ov2.openclip.models.open_model import open_model

    name = f"local-dir:{baselines / 'clip_tiny'}"
    flags = ["--model", name, *data_flags(squares, 8), flag, "--logs", str(tmp_path), "--name", "run"]
    assert ov2(["train", *flags]) == 0
    model = open_clip.create_model(name, load_weights=False, **option)
    model.load_state_dict(weights(tmp_path / "run" / "checkpoints" / "stage_1.pt"))
    images, texts = torch.rand(2, 3, 24, 24), open_clip.get_tokenizer(name)(["a dog", "two cats"])
    found = open_model(tmp_path / "run").model
    with torch.no_grad():
        for mine, theirs in zip(found(images, texts), model(images, texts), strict=True):
            torch.testing.assert_close(mine, theirs)


def coca_loss(run: Path, squares: Path) -> float:
    from open_clip_ov2.data.captions import parse_caption_keys
    from open_clip_ov2.data.loader import EvalLoader
    from open_clip_ov2.data.shards import WebDatasetSource
    from open_clip_ov2.openclip.models.open_model import open_model

    loaded = open_model(run)
    source, keys = WebDatasetSource((f"{squares}/val/00000.tar",)), parse_caption_keys("json:recaption,txt")
    loader = EvalLoader(source, loaded.preprocess, loaded.tokenizer, batch_size=10, num_workers=0, caption_keys=keys)
    (batch,) = loader
    with torch.no_grad():
        logits = loaded.model(batch.images_BCHW, batch.texts_BL)["logits"]
    labels = caption_targets(batch.texts_BL, 49407)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX).item()


def test_coca_without_contrast_survives_ddp(squares: Path, baselines: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Oracle: stock OpenCLIP crashes here at step 2 (docs/openclip.md); two processes, four steps."""
    model = ["--model", f"local-dir:{baselines / 'coca_tiny'}", "--coca-contrastive-loss-weight", "0"]
    model += ["--tokenizer", str(vocabulary), "--force-context-length", "12"]
    flags = ["--gradient-reduction", "bf16", "--logs", str(tmp_path), "--name", "run"]  # what it does: test_step.py
    done = finish(start([*model, *data_flags(squares, 64), *flags], 2))
    assert [status for status, _ in done] == [0, 0], done
    rows = results(tmp_path / "run", "train")
    assert rows[-1]["contrastive_loss"] == 0.0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "fixed: CoCa with contrastive weight 0" in log
    assert "gradients are summed between processes in bfloat16" in log


SLIPS = {
    "a run's folder as a model": (["--model", "."], "--model local-dir:."),
    "static graph and accumulation": (["--ddp-static-graph", "--accum-freq", "2"], "cannot accumulate"),
    "static graph and a global batch": (
        ["--ddp-static-graph", "--global-batch", "16", "--batch-size", "4"],
        "cannot accumulate",
    ),
    "no such model": (["--model", "ov2-vit-l-15"], "did you mean ov2-vit-l-14"),
    "keep ratio 0": (["--keep-ratio", "0"], "--keep-ratio"),
    "keep ratio above 1": (["--keep-ratio", "1.2"], "(0, 1]"),
    "keep ratio keeps nothing": (["--keep-ratio", "0.01"], "keeps none of 9 image tokens"),
    "eval keep ratio": (["--eval-keep-ratio", "2"], "--eval-keep-ratio"),
    "fusion": (["--fusion", "concat"], "prefix"),
    "caption keys": (["--caption-keys", "json:=3"], "--caption-keys"),
    "label smoothing": (["--label-smoothing", "1"], "--label-smoothing"),
    "budget uncompiled": (["--activation-memory-budget", "0.5"], "without --torchcompile"),
    "budget": (["--activation-memory-budget", "1.5", "--torchcompile"], "--activation-memory-budget"),
    "whole encoder uncompiled": (["--compile-encoder", "whole"], "--compile-encoder whole without --torchcompile"),
    "CUDA graphs": (["--torchcompile", "--compile-encoder", "cuda-graphs", "--device", "cpu"], "without a GPU"),
    "whole encoder": (["--model", "genlip-of-ov2-vit-nano-8", "--torchcompile", "--compile-encoder", "whole"], "alone"),
    "recomputed twice": (["--recompute-elementwise", "--grad-checkpointing"], "recomputes whole blocks"),
    "attention kernel": (["--attention-kernel", "FA3", "--device", "cpu"], "--attention-kernel without a GPU"),
    "fp8": (["--fp8", "on", "--device", "cpu"], "--fp8 on without a GPU"),
    "fp8 adapters": (["--fp8", "emulated", "--lora-rank", "2"], "--lora-rank"),
    "z-loss": (["--z-loss", "-1"], "--z-loss"),
    "tokenizer": (["--tokenizer", "./nowhere"], "--tokenizer ./nowhere"),
    "pixels": (["--max-image-pixels", "zero"], "--max-image-pixels"),
    "sample captions": (["--sample-captions", "-1"], "--sample-captions"),
    "shuffle buffer": (["--shuffle-buffer", "0"], "--shuffle-buffer"),
    "unknown flag": (["--keep-ration", "0.5"], "--keep-ration"),
    "upstream flag": (["--batch-size", "many"], "--batch-size"),
    "amp on a CPU": (["--precision", "amp", "--device", "cpu"], "amp_bf16 or fp32"),
    "lock text": (["--lock-text"], "it is for CLIP and CoCa"),
    "missing shard": (["--train-data", "nowhere-{0..3}.tar"], "4 of 4 shards do not exist: nowhere-0.tar"),
    "too many workers": (["--workers", "9"], "--dataset-resampled"),
    "tracker": (["--report-to", "wanbd"], "did you mean wandb?"),
    "stage": (["--stage", "24:sample=8"], "samples"),
    "stage and epochs": (["--stage", "24:samples=8"], "--epochs"),
    "recipe": (["--recipe", "nowhere.toml"], "nowhere.toml"),
    "until stage": (["--until-stage", "2"], "--until-stage 2: the run has 1 stages"),
    "global batch": (["--global-batch", "9", "--accum-freq", "2"], "global batch 9"),
    "base lr": (["--base-lr", "-1"], "--base-lr"),
    "warm-up": (["--warmup-samples", "1.5"], "--warmup-samples"),
    "save every steps": (["--save-every-steps", "0"], "--save-every-steps"),
    "save every minutes": (["--save-every-minutes", "nan"], "--save-every-minutes"),
    "keep checkpoints": (["--keep-checkpoints", "0"], "--keep-checkpoints"),
    "val every samples": (["--val-every-samples", "0"], "--val-every-samples"),
    "bad steps": (["--max-bad-steps", "0"], "--max-bad-steps"),
    "stall warning": (["--stall-warning", "0"], "--stall-warning"),
    "abbreviation": (["--prec", "amp_bf16"], "--prec: write flags in full; did you mean --precision?"),
    "zero-shot folder": (["--model", "ViT-B-32", "--imagenet-val", "/nowhere"], "--imagenet-val /nowhere"),
    "optimizer": (["--opt", "sgd"], "--opt sgd"),
    "scheduler": (["--lr-scheduler", "linear"], "--lr-scheduler: 'linear': expected one of cosine"),
    "cooldown": (["--lr-scheduler", "const-cooldown"], "--epochs-cooldown"),
    "negative lr": (["--lr", "-1"], "--lr: -1"),
    "negative warm-up": (["--warmup", "-5"], "--warmup: -5: expected an integer >= 0"),
    "no such folder of a model": (["--model", "local-dir:/nowhere"], "local-dir:/nowhere"),
    "resume from a file": (["--resume", "x.pt"], "--resume x.pt: no such file"),
    "weights beside a folder": (["--model", TINY_MODEL, "--pretrained", "x.pt"], "OpenCLIP ignores it beside --model"),
    "keep and delete": (["--delete-previous-checkpoint", "--keep-checkpoints", "2"], "give one or the other"),
    "a name that leads out": (["--name", "../run"], "--name ../run: leads out of --logs"),
    "ov2 flag with CLIP": (
        ["--model", "ViT-B-32", "--keep-ratio", "0.5"],
        "--keep-ratio with --model ViT-B-32: it is for ov2 models",
    ),
}


def test_validation_data_of_which_nothing_can_be_used_is_told_before_training(
    squares: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions under a key that there is none of. Oracle: no step was made."""
    (shard,) = write_square_shards(tmp_path / "val", 1, 4)
    shard.write_bytes(shard.read_bytes().replace(b".txt", b".xyz"))
    flags = [*NANO, *data_flags(squares), "--tokenizer", str(vocabulary), "--logs", str(tmp_path), "--name", "run"]
    assert ov2(["train", *flags, "--val-data", str(shard)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the validation data has no usable sample" in error
    assert "--val-data" in error
    assert not (tmp_path / "run" / "results.jsonl").read_text()


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_one_line(slip: str, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, expected = SLIPS[slip]
    common = [*NANO, *data_flags(squares), "--logs", str(tmp_path), "--name", "run"]
    assert ov2(["train", *common, *flags]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert err[-1].startswith("ov2: error: ")
    assert expected in err[-1]
    assert not [line for line in err if "Traceback" in line]


def test_help_lists_our_flags_and_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    assert ov2(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--keep-ratio" in out
    assert "--grad-checkpointing" in out


def test_coca_reports_its_losses_without_their_weights(squares: Path, baselines: Path, tmp_path: Path) -> None:
    """Oracle: the same model at another weight; the first step's losses do not depend on it."""
    first = []
    for weight in ("1", "4"):
        flags = ["--model", f"local-dir:{baselines / 'coca_tiny'}", *data_flags(squares, 8), "--logs", str(tmp_path)]
        assert ov2(["train", *flags, "--name", weight, "--coca-caption-loss-weight", weight]) == 0
        first.append(results(tmp_path / weight, "train")[0])
    assert first[0]["caption_loss"] == pytest.approx(first[1]["caption_loss"], rel=1e-5)
    difference = 3 * first[0]["caption_loss"]
    assert first[1]["loss"] - first[0]["loss"] == pytest.approx(difference, rel=1e-4)

"""Averaged weights, rates by depth, adapters, frozen parts and steps by tokens, each against its own equation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from training import TINY, TINY_MODEL, assert_equal_weights, data_flags, figures, results

from open_clip_ov2 import open_model
from open_clip_ov2.cli import main as ov2
from open_clip_ov2.openclip.run import finetune, optimizers
from open_clip_ov2.train.checkpoint import average_of, live_weights
from open_clip_ov2.train.ema import WeightAverage

SAVING = ["--save-every-steps", "1", "--keep-checkpoints", "9", "--sample-captions", "0"]
AVERAGED, ADAPTED = ["--ema-decay", "0.75"], ["--lora-rank", "2", "--lora-alpha", "6"]
LAYERS = "visual.transformer.resblocks."


def run(squares: Path, vocabulary: Path, logs: Path, flags: Sequence[str]) -> Path:
    """Two steps of eight samples."""
    flags = [*data_flags(squares, 16), *TINY, "--tokenizer", str(vocabulary), *SAVING, "--lr", "1e-2", *flags]
    assert ov2(["train", *flags, "--logs", str(logs), "--name", "run"]) == 0
    return logs / "run"


def checkpoint(folder: Path, name: str = "stage_1.pt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def plain(squares: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(squares, vocabulary, tmp_path_factory.mktemp("plain"), [])


@pytest.fixture(scope="module")
def begin(squares: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights before the first step: those of a run whose learning rate is 0."""
    return checkpoint(run(squares, vocabulary, tmp_path_factory.mktemp("begin"), ["--lr", "0"]))["state_dict"]


@pytest.mark.parametrize("aids", [AVERAGED, [*AVERAGED, *ADAPTED, "--freeze", "text_decoder.blocks.*"]])
def test_averages_follow_their_equation_and_resume_bit_for_bit(
    squares: Path, vocabulary: Path, tmp_path: Path, plain: Path, begin: dict[str, torch.Tensor], aids: list[str]
) -> None:
    """Oracle: a <- 0.75 a + 0.25 w after each step; training is what it is without; the run that was not stopped."""
    whole = run(squares, vocabulary, tmp_path / "whole", aids)
    first, last = checkpoint(whole, "stage_1_samples_8.pt"), checkpoint(whole)
    one, two, average = live_weights(first), live_weights(last), average_of(last)
    assert average
    assert not any(name.startswith("visual.ln_post") for name in average)
    for name, value in average.items():
        before = average_of(first)[name]
        torch.testing.assert_close(value, 0.75 * before + 0.25 * two[name])
        if name in begin:
            torch.testing.assert_close(before, 0.75 * begin[name] + 0.25 * one[name])
    validated = results(whole, "val")[-1]
    if aids == AVERAGED:
        assert_equal_weights(two, checkpoint(plain)["state_dict"])
        assert validated["live_caption_loss"] == results(plain, "val")[-1]["caption_loss"]
    assert validated["caption_loss"] != validated["live_caption_loss"]

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    (again / "run" / "checkpoints" / "stage_1.pt").unlink()
    assert run(squares, vocabulary, again, aids) == again / "run"
    resumed = checkpoint(again / "run")
    for part in (live_weights, average_of, lambda content: content["state_dict"]):
        assert_equal_weights(part(resumed), part(last))
    assert figures(again / "run") == figures(whole)
    opened = open_model(again / "run").model.state_dict()
    assert_equal_weights(opened, last["state_dict"])


def test_adapters_are_merged_and_the_rest_of_the_tower_stays(
    squares: Path, vocabulary: Path, tmp_path: Path, begin: dict[str, torch.Tensor]
) -> None:
    """Oracle: W + 6 / 2 * B A, written out; the weights before the first step."""
    folder = run(squares, vocabulary, tmp_path, [*ADAPTED, "--freeze", "text_decoder.lm_head.*"])
    content = checkpoint(folder)
    merged, live = content["state_dict"], live_weights(content)
    assert merged.keys() == begin.keys()
    adapted = 0
    for name, value in merged.items():
        owner = name.replace("in_proj_weight", "in_proj.weight").removesuffix(".weight")
        if f"{owner}.lora_A.default.weight" in live:
            down, up = (live[f"{owner}.lora_{which}.default.weight"] for which in "AB")
            torch.testing.assert_close(value, begin[name] + 3.0 * up @ down)
            assert down.shape[0] == 2
            assert not torch.equal(value, begin[name])
            adapted += 1
        else:
            trained = name.startswith("text_decoder.") and not name.startswith("text_decoder.lm_head.")
            assert torch.equal(value, begin[name]) != trained, name
    assert adapted == 4 * len({name.split(".")[3] for name in merged if name.startswith(LAYERS)})


def test_gradients_of_adapters_are_those_of_the_equation() -> None:
    """Oracle: of y = (W + s B A) x, dA = s B^T dW and dB = s dW A^T, with dW of the plain model with merged weights."""
    torch.manual_seed(0)
    model = open_clip.create_model(TINY_MODEL, load_weights=False)
    images, ids = torch.randn(2, 3, *model.visual.image_size), torch.randint(3, 40, (2, 8))
    other, kept = open_clip.create_model(TINY_MODEL, load_weights=False), torch.tensor([[0, 2], [1, 3]])
    finetune.add_lora(model, rank=2, alpha=5.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    other.load_state_dict(finetune.merged_state(model))
    for each in (model, other):
        each(images, ids, kept_idx=kept)["logits"].square().mean().backward()
    grads, whole = ({n: p.grad for n, p in each.named_parameters()} for each in (model, other))
    live = model.state_dict()
    for owner in {name.split(".lora_A")[0] for name in live if ".lora_A" in name}:
        down, up = (f"{owner}.lora_{which}.default.weight" for which in "AB")
        gradient = whole[f"{owner}.weight".replace("in_proj.weight", "in_proj_weight")]
        torch.testing.assert_close(grads[down], 2.5 * live[up].T @ gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(grads[up], 2.5 * gradient @ live[down].T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("opt", ["adamw", "timm/adamw", "timm/muon"])
def test_rates_by_depth_and_decay_by_name(opt: str) -> None:
    """Two steps. Oracle: Adam with decoupled weight decay written out, a parameter at a time, at the rate that MAE's
    rule gives it (0.5 to the power of the blocks above and one more); of Muon, the groups alone."""
    torch.manual_seed(0)
    model = open_clip.create_model(TINY_MODEL, load_weights=False)
    grouping = lambda: optimizers.Grouping(model, ["*.c_fc.weight"], 0.5)  # noqa: E731
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if opt == "adamw":
        plain = [p for p in trained.values() if p.ndim < 2]
        groups = [{"params": plain, "weight_decay": 0.0},
                  {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": 0.1}]  # fmt: skip
        optimizer = optimizers.adamw_for(grouping)(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    else:
        create = optimizers.timm_optimizer(__import__("timm.optim").optim.create_optimizer_v2, grouping)
        optimizer = create(model, opt.removeprefix("timm/"), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    blocks = len(model.visual.transformer.resblocks)
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for name in (name for name, p in trained.items() if any(p is one for one in group["params"])):
            rates[name], decays[name] = group["lr_scale"], group["weight_decay"]
    assert rates.keys() == trained.keys()
    for name in trained:
        block = int(name.split(".")[3]) + 1 if name.startswith(LAYERS) else 0 if "visual." in name else blocks + 1
        assert rates[name] == 0.5 ** (blocks + 1 - block), name
        kept = trained[name].ndim < 2 or "c_fc.weight" in name or "embedding" in name
        assert decays[name] == (0.0 if kept else 0.1), name
    if opt == "timm/muon":
        return
    state = {name: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}

    def schedule(step: int) -> float:  # as OpenCLIP's: one rate for all groups
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        return 1e-2 / (step + 1)

    scaled = optimizers.scaled_schedule(schedule, optimizer)
    for step in range(2):
        lr = scaled(step)
        for name, parameter in trained.items():
            parameter.grad = torch.randn_like(parameter)
            w, m, v = state[name]
            m, v = 0.9 * m + 0.1 * parameter.grad, 0.95 * v + 0.05 * parameter.grad**2
            move = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            state[name] = (w - lr * rates[name] * (decays[name] * w + move), m, v)
        optimizer.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach(), state[name][0], rtol=1e-5, atol=1e-6)


def test_rates_and_frozen_parts_of_a_run(
    squares: Path, vocabulary: Path, tmp_path: Path, begin: dict[str, torch.Tensor], capsys: Any
) -> None:
    """Oracle: with no weight decay, the first step of a rate is that share of the first step at the full rate; the
    resumed run; other groups than the checkpoint's are an error."""
    flags = ["--wd", "0", "--lr-layer-decay", "0.5", "--freeze", "text_decoder.token_embedding.*"]
    whole = run(squares, vocabulary, tmp_path / "decayed", flags)
    full = run(squares, vocabulary, tmp_path / "full", ["--wd", "0"])
    one, other = (checkpoint(each, "stage_1_samples_8.pt")["state_dict"] for each in (whole, full))
    for name, scale in ((f"{LAYERS}1.mlp.c_fc.weight", 0.5), (f"{LAYERS}0.attn.in_proj_weight", 0.25),
                        ("visual.conv1.weight", 0.125), ("text_decoder.lm_head.weight", 1.0)):  # fmt: skip
        torch.testing.assert_close(one[name] - begin[name], scale * (other[name] - begin[name]), rtol=1e-2, atol=1e-6)
    table = "text_decoder.token_embedding.weight"
    assert torch.equal(checkpoint(whole)["state_dict"][table], begin[table])
    assert (whole / "out.log").read_text().count(
        "--lr-layer-decay 0.5: of the learning rate, the vision tower has"
    ) == 1
    assert [row["lr"] for row in results(whole, "train")] == [row["lr"] for row in results(full, "train")]

    last = checkpoint(whole)["state_dict"]
    (whole / "checkpoints" / "stage_1.pt").unlink()
    run(squares, vocabulary, tmp_path / "decayed", flags)
    assert_equal_weights(checkpoint(whole)["state_dict"], last)
    (whole / "checkpoints" / "stage_1.pt").unlink()
    with pytest.raises(AssertionError):
        run(squares, vocabulary, tmp_path / "decayed", ["--wd", "0", "--override"])
    assert "other parameter groups" in capsys.readouterr().err


def test_an_average_goes_through_the_position_table_of_the_next_stage(
    squares: Path, baselines: Path, vocabulary: Path, tmp_path: Path
) -> None:
    """CLIP's table is learned. Oracle: OpenCLIP's own interpolation of the average, and the equation on top."""
    flags = ["--train-data", f"{squares}/train/{{00000..00003}}.tar", "--workers", "0", "--batch-size", "8"]
    flags += ["--model", f"local-dir:{baselines / 'clip_tiny'}", "--tokenizer", str(vocabulary), *AVERAGED]
    flags += ["--force-context-length", "12", "--warmup", "0", "--stage", "16:samples=8,lr=1e-2"]
    assert ov2(["train", *flags, "--stage", "24:samples=8,lr=1e-30", "--logs", str(tmp_path), "--name", "run"]) == 0
    before, after = checkpoint(tmp_path / "run", "stage_1.pt"), checkpoint(tmp_path / "run", "stage_2.pt")
    model = open_clip.create_model(f"local-dir:{baselines / 'clip_tiny'}", load_weights=False)
    tables = []
    for state in (average_of(before), live_weights(before)):
        fitted = dict(state)
        open_clip.factory.resize_pos_embed(fitted, model)
        tables.append(fitted["visual.positional_embedding"])
    assert tables[0].shape == (1 + 9, 32)
    expected = 0.75 * tables[0] + 0.25 * tables[1]
    torch.testing.assert_close(average_of(after)["visual.positional_embedding"], expected)


def test_an_average_of_half_precision_weights_moves() -> None:
    """bfloat16 has 8 bits: in it, a share of 1/1000 would be lost. Oracle: the equation in float64, 100 steps."""
    model = torch.nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.999)
    torch.nn.init.ones_(model.weight)
    for _ in range(100):
        average.update()
    torch.testing.assert_close(average.state()["weight"].double(), torch.full((1, 2), 1 - 0.999**100).double())
    with average.applied():
        assert model.weight.dtype == torch.bfloat16
        assert math.isclose(float(model.weight[0, 0].detach()), 1 - 0.999**100, rel_tol=1e-2)
    assert float(model.weight[0, 0].detach()) == 1.0


def test_a_step_of_tokens_is_the_step_of_its_batches(squares: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Every caption has 3 words and an end, so 20 tokens are more than one batch of 4 and at most two. Oracle:
    --accum-freq 2 at a constant rate, bit for bit; the resumed run."""
    shared = ["--batch-size", "4", "--lr-scheduler", "const", "--warmup", "0"]
    accumulated = run(squares, vocabulary, tmp_path / "accumulated", [*shared, "--accum-freq", "2"])
    tokens = [*shared, "--tokens-per-step", "20"]
    whole = run(squares, vocabulary, tmp_path / "tokens", tokens)
    last = checkpoint(accumulated)["state_dict"]
    assert_equal_weights(checkpoint(whole)["state_dict"], last)
    assert [row["samples_seen"] for row in results(whole, "train")] == [8, 16]
    (whole / "checkpoints" / "stage_1.pt").unlink()
    run(squares, vocabulary, tmp_path / "tokens", tokens)
    assert_equal_weights(checkpoint(whole)["state_dict"], last)


REFUSED = {
    "--lora-rank 2 --lock-image": "--lora-rank freezes the vision tower already",
    "--lora-alpha 2": "without --lora-rank",
    "--tokens-per-step 9 --accum-freq 2": "the number of images in a step is not fixed",
    "--tokens-per-step 9 --base-lr 1": "give --lr",
    "--freeze nothing.*": "--freeze nothing.*: matches no parameter",
    "--freeze *": "no parameter is left to train",
    "--lock-image --freeze text*": "no parameter is left to train",
    "--wd-exclude nothing": "--wd-exclude nothing: matches no parameter",
    "--ema-decay 1": "expected a number >= 0 and < 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_one_line(squares: Path, tmp_path: Path, capsys: Any, flags: str) -> None:
    common = [*data_flags(squares, 16), *TINY, "--logs", str(tmp_path)]
    assert ov2(["train", *common, *flags.split()]) == 2
    assert REFUSED[flags] in capsys.readouterr().err.strip().splitlines()[-1]

"""A step of `ov2 bench`. Oracles: OpenCLIP's own optimizer rule, torch's FLOP counter, weights before and after."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_clip_ov2 import training
from open_clip_ov2.compare.bench.measured_step import Vocabulary, synthetic_batch
from open_clip_ov2.compare.bench.settings import BENCH_MODELS, BenchSettings, CaptionLengths, Case
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.run.bench_model import BenchModel

TINY = "ov2-bench-tiny"
LENGTHS = CaptionLengths(16, 16, 16.0)  # the whole context: nothing is padding
MOMENTUM = ("--momentum", "0.9", "--beta1", "0.9", "--beta2", "0.95")
KINDS = ("", "coca-of-", "clip-of-")
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def built(model: str, *more: str) -> BenchModel:
    case = Case(16, "fp32", 4)
    job = BenchSettings(TINY, device="cpu", keep_ratio=0.5, caption_tokens=LENGTHS, threads=1).job(model, case)
    return training.bench_model([*job.argv, *more], "cpu", job.flags_of_ov2, BENCH_MODELS)


def pairs_for(model: BenchModel, count: int = 2) -> Pairs:
    words, context = Vocabulary(*model.caption_ids(TINY)), model.facts.context_length
    return [model.loaded(*synthetic_batch(4, 16, context, LENGTHS, words, seed)) for seed in range(count)]


def test_all_see_the_same_pixels() -> None:
    """Oracle: what our step makes of uint8 pictures, with the mean and std of the stock model."""
    model = built(f"clip-of-{TINY}")
    images, texts = synthetic_batch(2, 16, 8, LENGTHS, Vocabulary(*model.caption_ids(TINY)), 0)
    floats, _ = model.loaded(images, texts)
    cfg = model.model.visual.preprocess_cfg
    step = Compute(torch.device("cpu"), "fp32", 1, 0, tuple(cfg["mean"]), tuple(cfg["std"]))
    assert images.dtype == torch.uint8
    torch.testing.assert_close(floats, step.pixels(images), atol=0, rtol=0)


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_every_weight(kind: str, accum_freq: int) -> None:
    model = built(kind + TINY, "--accum-freq", str(accum_freq))
    before = copy.deepcopy(model.model.state_dict())
    model.run(pairs_for(model))
    after = model.model.state_dict()
    trained = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    assert not {name for name in trained if torch.equal(before[name], after[name])}
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())


@pytest.mark.parametrize("kind", ["coca", "clip"])
def test_the_flops_of_stock_steps_are_those_that_are_run(kind: str) -> None:
    """For ov2 test_meters.py has the same. The counter knows no fused attention on CPUs."""
    model = built(f"{kind}-of-{TINY}")
    pairs = pairs_for(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.run(pairs)
    counted = counter.get_total_flops() / sum(len(images) for images, _ in pairs)
    assert model.image_flops(LENGTHS.mean - 1) == pytest.approx(counted, rel=0.02)


def test_no_decay_where_openclip_has_none() -> None:
    """Oracle: the rule in OpenCLIP's `main`: vectors, norms, biases and the logit scale."""
    model = built(f"coca-of-{TINY}")
    plain, decayed = model.optimizer.param_groups
    assert plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == model.args.wd > 0
    names = {id(parameter): name for name, parameter in model.model.named_parameters()}
    assert all(parameter.ndim < 2 or "ln" in names[id(parameter)] for parameter in plain["params"])
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert "logit_scale" in {names[id(parameter)] for parameter in plain["params"]}
    assert not model.optimizer.defaults["fused"]  # `main` does not ask for it


def test_flags_of_ov2_reach_ov2_models_alone() -> None:
    """Oracle: the model's own keep ratio; a CLIP that would refuse the flag is built. Of a range the largest counts."""
    assert built(TINY).model.token_drop.keep_ratio.high == 0.5
    ratio = training.bench_model(
        ["--model", TINY, "--dataset-type", "synthetic", "--batch-size", "4", "--keep-ratio", "0.25:0.75"], "cpu", [],
        BENCH_MODELS,
    ).model.token_drop.keep_ratio  # fmt: skip
    assert ratio.low == ratio.high == 0.75
    assert not built(f"clip-of-{TINY}").is_ov2


@pytest.mark.parametrize("kind", KINDS)
def test_word_pieces_take_the_place_of_the_vocabulary(kind: str, vocabulary: Path) -> None:
    """Oracle: the lines of vocab.txt, rounded up to 64; the model trains on captions drawn from them."""
    model = built(kind + TINY, "--tokenizer", str(vocabulary))
    words = Vocabulary(*model.caption_ids(TINY))
    assert words == Vocabulary(-(-len((vocabulary / "vocab.txt").read_text().splitlines()) // 64) * 64, 1, 2, 0)
    embedded = {p.shape[0] for name, p in model.model.named_parameters() if "token_embedding" in name}
    assert embedded == {words.size}
    model.run(pairs_for(model, 1))


def test_what_training_sets_is_measured_too(baselines: Path) -> None:
    """Oracle: by hand. A model of a folder, as a comparison may have; another optimizer; a locked tower."""
    model = built(
        f"local-dir:{baselines / 'coca_tiny'}",
        "--force-image-size",
        "24",
        "--opt",
        "timm/sgd",
        "--lr",
        "0.1",
        *MOMENTUM,
    )
    assert model.facts.context_length == 16
    assert type(model.optimizer).__name__ == "SGD"
    locked = built(f"clip-of-{TINY}", "--lock-image")
    assert not any(parameter.requires_grad for parameter in locked.model.visual.parameters())


def test_mistakes() -> None:
    with pytest.raises(UserError, match="ov3"):
        built("ov3")
    with pytest.raises(UserError, match="expected an ov2 model"):
        built(TINY).caption_ids("ViT-L-14")

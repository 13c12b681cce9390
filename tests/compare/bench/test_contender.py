"""A contender's step. Oracles: OpenCLIP's own optimizer rule, torch's FLOP counter, weights before and after."""

from __future__ import annotations

import copy
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from open_clip_ov2.compare.bench.cases import OWN_MODELS, CaptionLengths
from open_clip_ov2.compare.bench.synthetic import Vocabulary, synthetic_batch
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.run import bench_arm as seam

TINY = "ov2-bench-tiny"
LENGTHS = CaptionLengths(16, 16, 16.0)  # the whole context: nothing is padding


@pytest.fixture(autouse=True)
def _models() -> None:
    if TINY not in open_clip.list_models():
        seam.add_models(OWN_MODELS)


def made(model: str) -> tuple[seam.Contender, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    contender = seam.Contender(seam.ContenderOptions(model, 16, "fp32", 4, "cpu"))
    words = Vocabulary(*seam.caption_ids(TINY))
    return contender, [
        contender.loaded(*synthetic_batch(4, 16, contender.context_length, LENGTHS, words, seed)) for seed in range(2)
    ]


def test_all_see_the_same_pixels() -> None:
    """Oracle: what our step makes of uint8 pictures, with the mean and std of the stock model."""
    contender, _ = made(f"clip-of-{TINY}")
    images, texts = synthetic_batch(2, 16, 8, LENGTHS, Vocabulary(*seam.caption_ids(TINY)), 0)
    floats, _ = contender.loaded(images, texts)
    cfg = contender.model.visual.preprocess_cfg
    step = Compute(torch.device("cpu"), "fp32", 1, 0, tuple(cfg["mean"]), tuple(cfg["std"]))
    assert images.dtype == torch.uint8
    torch.testing.assert_close(floats, step.pixels(images), atol=0, rtol=0)


@pytest.mark.parametrize("model", [TINY, f"coca-of-{TINY}", f"clip-of-{TINY}"])
def test_a_step_trains_every_weight(model: str) -> None:
    contender, pairs = made(model)
    before = copy.deepcopy(contender.model.state_dict())
    contender.run(pairs)
    after = contender.model.state_dict()
    trained = {name for name, parameter in contender.model.named_parameters() if parameter.requires_grad}
    assert not {name for name in trained if torch.equal(before[name], after[name])}
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())


@pytest.mark.parametrize("kind", ["coca", "clip"])
def test_the_flops_of_stock_steps_are_those_that_are_run(kind: str) -> None:
    """For ov2 test_meters.py has the same. The counter knows no fused attention on CPUs."""
    contender, pairs = made(f"{kind}-of-{TINY}")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        contender.run(pairs)
    counted = counter.get_total_flops() / sum(len(images) for images, _ in pairs)
    assert contender.image_flops(LENGTHS.mean_targets) == pytest.approx(counted, rel=0.02)


def test_no_decay_where_openclip_has_none() -> None:
    """Oracle: the rule in OpenCLIP's `main`: vectors, norms, biases and the logit scale."""
    contender, _ = made(f"coca-of-{TINY}")
    plain, decayed = contender.optimizer.param_groups
    assert plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == contender.args.wd > 0
    names = {id(parameter): name for name, parameter in contender.model.named_parameters()}
    assert all(parameter.ndim < 2 or "ln" in names[id(parameter)] for parameter in plain["params"])
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert "logit_scale" in {names[id(parameter)] for parameter in plain["params"]}
    assert not contender.optimizer.defaults["fused"]  # `main` does not ask for it


@pytest.mark.parametrize("kind", ["", "coca-of-", "clip-of-"])
def test_word_pieces_take_the_place_of_the_vocabulary(kind: str, vocabulary: Path) -> None:
    """Oracle: the lines of vocab.txt, rounded up to 64; the model trains on captions drawn from them."""
    words = Vocabulary(*seam.caption_ids(TINY, str(vocabulary)))
    assert words == Vocabulary(-(-len((vocabulary / "vocab.txt").read_text().splitlines()) // 64) * 64, 1, 2, 0)
    contender = seam.Contender(seam.ContenderOptions(kind + TINY, 16, "fp32", 4, "cpu", tokenizer=str(vocabulary)))
    embedded = {p.shape[0] for name, p in contender.model.named_parameters() if "token_embedding" in name}
    assert embedded == {words.size}
    contender.run([contender.loaded(*synthetic_batch(4, 16, contender.context_length, LENGTHS, words, 0))])


def test_a_model_of_a_folder(baselines: Path) -> None:
    """As an arm of a comparison may be; its weights, if any, are not wanted."""
    made = seam.Contender(seam.ContenderOptions(f"local-dir:{baselines / 'coca_tiny'}", 24, "fp32", 4, "cpu"))
    assert made.context_length == 16


def test_slips() -> None:
    with pytest.raises(UserError, match="no such model"):
        seam.Contender(seam.ContenderOptions("ov3", 16, "fp32", 4, "cpu"))
    with pytest.raises(UserError, match="no ov2 model"):
        seam.caption_ids("ViT-L-14")

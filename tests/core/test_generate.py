"""Generation. Oracles: the full forward pass without a cache, brute force over all sentences, transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from open_clip_ov2.core import FUSIONS, CaptionModel
from open_clip_ov2.core.generate import GenerationConfig, _pick
from open_clip_ov2.openclip.models.factory import build_caption_model

VOCAB, BOS, EOS = 12, 10, 11


def tiny(fusion: str = "prefix", context_length: int = 10, vocab: int = VOCAB, **more: object) -> CaptionModel:
    torch.manual_seed(0)
    model = build_caption_model(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": context_length, "vocab_size": vocab, "bos_id": BOS, "eos_id": EOS},
        decoder_cfg={"width": 16, "layers": 2, "heads": 2, "mlp_width": 32},
        fusion=fusion,
        **{"keep_ratio": 1.0, **more},
    ).eval()
    with torch.no_grad():  # sharpen, so that choices are far from ties
        model.text_decoder.lm_head.weight.mul_(4)
    return model


def full_logits(model: CaptionModel, images: Tensor, ids: Tensor) -> Tensor:
    """Logits after the last id, from a whole forward pass: the forward drops its last input."""
    padded = torch.cat([ids, ids[:, -1:]], dim=1)
    return model(images, padded)["logits"][:, -1]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_with_cache_equals_greedy_without(fusion: str) -> None:
    model, images = tiny(fusion), torch.randn(5, 3, 16, 16)
    generated = model.generate(images, seq_len=9)
    ids = torch.full((5, 1), BOS)
    done = torch.zeros(5, dtype=torch.bool)
    while ids.shape[1] < generated.shape[1]:
        token = full_logits(model, images, ids).argmax(-1).masked_fill(done, 0)
        done |= token == EOS
        ids = torch.cat([ids, token[:, None]], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_batch_of_images_equals_one_by_one(fusion: str) -> None:
    model, images = tiny(fusion), torch.randn(4, 3, 16, 16)
    for kind in ("greedy", "beam_search"):
        together = model.generate(images, generation_type=kind, fixed_output_length=True)
        apart = [model.generate(x[None], generation_type=kind, fixed_output_length=True) for x in images]
        assert torch.equal(together, torch.cat(apart)), kind


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beam_finds_the_best_of_all_sentences(fusion: str, penalty: float) -> None:
    """Oracle: brute force over every sentence of up to three tokens after bos."""
    model, image = tiny(fusion, vocab=VOCAB), torch.randn(1, 3, 16, 16)
    best, best_score = None, -float("inf")
    for length in (1, 2, 3):
        for words in itertools.product(range(VOCAB), repeat=length):
            if EOS in words[:-1] or (length < 3 and words[-1] != EOS):
                continue
            ids = torch.tensor([[BOS, *words]])
            log_p = model(image, torch.cat([ids, ids[:, -1:]], 1))["logits"].log_softmax(-1)[0]
            score = sum(log_p[i, word].item() for i, word in enumerate(words)) / length**penalty
            if score > best_score:
                best, best_score = words, score
    found = model.generate(image, generation_type="beam_search", num_beams=VOCAB**2, seq_len=4, length_penalty=penalty)[
        0
    ].tolist()
    assert tuple(found[1 : 1 + len(best)]) == best
    assert not any(found[1 + len(best) :])


def test_beam_of_one_is_greedy() -> None:
    """Oracle: transformers, which dispatches one beam to greedy search."""
    model, images = tiny(), torch.randn(6, 3, 16, 16)
    greedy = model.generate(images, fixed_output_length=True)
    beam = model.generate(images, generation_type="beam_search", num_beams=1, fixed_output_length=True)
    assert torch.equal(greedy, beam)


def test_a_prompt_is_continued() -> None:
    model, image = tiny(), torch.randn(2, 3, 16, 16)
    whole = model.generate(image, fixed_output_length=True)
    again = model.generate(image, text=whole[:, :4], fixed_output_length=True)
    rows = [row for row in range(2) if EOS not in whole[row, :4]]
    assert rows
    assert torch.equal(whole[rows], again[rows])


def test_an_option_out_of_range_is_named_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"^top_p must lie in \(0, 1\]; got 1\.5$"):
        GenerationConfig(seq_len=4, eos_id=EOS, pad_id=0, top_p=1.5)
    with pytest.raises(ValueError, match=r"^min_seq_len must not exceed seq_len, 4; got 5$"):
        GenerationConfig(seq_len=4, eos_id=EOS, pad_id=0, min_seq_len=5)


@pytest.mark.parametrize(("kind", "option"), [("top_k", {"top_k": 3}), ("top_p", {"top_p": 0.6})])
def test_sampling_filters_as_transformers_does(kind: str, option: dict[str, float]) -> None:
    """Oracle: transformers' logits warpers; every draw must be among the tokens they leave."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, VOCAB) * 2
    warper = TopKLogitsWarper(3) if kind == "top_k" else TopPLogitsWarper(0.6)
    allowed = torch.isfinite(warper(torch.zeros(4, 1, dtype=torch.long), logits.clone()))
    config = GenerationConfig(seq_len=4, eos_id=EOS, pad_id=0, generation_type=kind, **option)
    draws = torch.stack([_pick(logits, config) for _ in range(600)])
    for row in range(4):
        assert set(draws[:, row].tolist()) == set(allowed[row].nonzero()[:, 0].tolist())


def test_sampling_is_seedable_and_min_length_holds() -> None:
    model, image = tiny(), torch.randn(3, 3, 16, 16)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            image,
            generation_type="top_p",
            temperature=3.0,
            generator=generator,
            min_seq_len=6,
            fixed_output_length=True,
        )

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert (sample(3)[:, :5] != EOS).all()


def test_generate_leaves_the_mode_alone_and_checks_lengths() -> None:
    model, image = tiny().train(), torch.randn(1, 3, 16, 16)
    model.generate(image)
    assert model.training
    with pytest.raises(ValueError, match="context length 10"):
        model.generate(image, seq_len=11)
    with pytest.raises(ValueError, match="top_p"):
        model.generate(image, generation_type="top_p", top_p=0.0)
    with pytest.raises(ValueError, match="generation_type is one of greedy"):
        model.generate(image, generation_type="best")


def test_several_captions_of_an_image() -> None:
    """Beams in the order of their score, computed by a full forward pass; samples among one token are greedy."""
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    options = {"generation_type": "beam_search", "num_beams": 5, "seq_len": 6, "length_penalty": 0.0}
    best, beams = model.generate(images, **options), model.generate(images, num_captions=4, **options)
    assert torch.equal(beams[::4, : best.shape[1]], best)
    log_p_BTV = model(images.repeat_interleave(4, 0), torch.cat([beams, beams[:, -1:]], 1))["logits"].log_softmax(-1)
    log_p_BT = log_p_BTV.gather(2, beams[:, 1:, None])[..., 0][:, : beams.shape[1] - 1]
    after_end = (beams[:, 1:] == EOS).cumsum(1) - (beams[:, 1:] == EOS).int() > 0
    scores = log_p_BT.masked_fill(after_end, 0).sum(1).view(2, 4)
    assert bool((scores.diff(dim=1) < 0).all())
    assert len({tuple(row) for row in beams[:4].tolist()}) == 4
    greedy = model.generate(images)
    assert torch.equal(
        model.generate(images, generation_type="top_k", top_k=1, num_captions=3), greedy[[0, 0, 0, 1, 1, 1]]
    )
    for wrong in ({"num_captions": 2}, {**options, "num_captions": 6}):
        with pytest.raises(ValueError, match="num_captions"):
            model.generate(images, **wrong)

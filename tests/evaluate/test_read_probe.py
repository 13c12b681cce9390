"""Reading probe. Oracle: the training loop, AdamW and greedy writing in plain torch on core/reference.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from probe_sets import PatchModel, encoded, features, to_integers

from open_clip_ov2.core import reference
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.attentive import standardiser
from open_clip_ov2.evaluate.eval_job import EvalJob, Readable
from open_clip_ov2.evaluate.options import EvalOptions
from open_clip_ov2.evaluate.read_probe import (
    BOS,
    EOS,
    ReadTraining,
    Spelling,
    batches,
    probe_layer,
    train_decoder,
    write,
)

WORDS = ["ab", "ba", "aba", "bab", "abb", "baa", "b", "a"]


def written_in_tokens(samples: int, seed: int, signal: float = 1.0) -> Readable:
    """Four tokens a sample, each with its place and the letter that stands there in its channels, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[number] for number in torch.randint(len(WORDS), (samples,), generator=generator)]
    values_MND = 0.1 * torch.randn(samples, 4, 8, generator=generator)
    for row, word in enumerate(words):
        for place in range(4):
            values_MND[row, place, place] += 1
            if place < len(word):
                values_MND[row, place, 4 + "ab".index(word[place])] += signal
    captions = [f"the word {word}" for word in words]
    return Readable(features(values_MND, words), list(range(samples)), ["words"] * samples, captions)


SHORT = ReadTraining(samples=96, width=32, layers=1, batch_size=8, lr=3e-3)


def plain_loop(train: Readable, test: Readable, training: ReadTraining, seed: int) -> tuple[list[float], list[str]]:
    """The losses and what is written of the test samples: every step spelled out, no code of the probe but the
    initial weights and the spelling."""
    spelling, values = Spelling(train.captions), train.tokens.values
    mean, std = values.flatten(0, 1).mean(0), values.flatten(0, 1).std(0, correction=0)
    start = training.decoder(values.shape[-1], len(spelling.pieces), seed).state_dict()
    params = {f"text_decoder.{name}": value.clone().requires_grad_() for name, value in start.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in params.items()} for _ in range(2))
    steps, heads = training.samples // training.batch_size, training.width // 32
    order, generator = [], torch.Generator().manual_seed(seed)
    while len(order) < training.samples:
        order += torch.randperm(len(train.captions), generator=generator).tolist()
    losses = []
    for step in range(steps):
        chosen = order[step * training.batch_size : (step + 1) * training.batch_size]
        rows = [spelling.ids(train.captions[one]) for one in chosen]
        ids_BL = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        logits = reference.decode(params, (values[chosen] - mean) / std, ids_BL[:, :-1], heads, "cross_attn")
        loss = F.cross_entropy(logits.flatten(0, 1), reference.targets(ids_BL, EOS).flatten())
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(params.values()))
        warmup = max(1, round(0.1 * steps))
        share = (
            (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        )
        with torch.no_grad():
            for (name, value), gradient in zip(params.items(), gradients, strict=True):
                value *= 1 - (training.lr * share * training.weight_decay if value.ndim > 1 else 0)
                first[name].lerp_(gradient, 0.1)
                second[name].lerp_(gradient.square(), 0.001)
                corrected = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                value -= training.lr * share * first[name] / (1 - 0.9 ** (step + 1)) / corrected
    texts = []
    for tokens_ND in (test.tokens.values - mean) / std:
        ids = [BOS]
        while ids[-1] != EOS and len(ids) < 64:
            logits = reference.decode(params, tokens_ND[None], torch.tensor([ids]), heads, "cross_attn")
            ids.append(int(logits[0, -1].argmax()))
        texts.append(spelling.text(ids[1:]))
    return losses, texts


@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_plain_loop(seed: int) -> None:
    train, test = written_in_tokens(40, 0), written_in_tokens(12, 1)
    spelling = Spelling(train.captions)
    standardised = standardiser(train.tokens.values, torch.tensor(train.rows))
    decoder, losses = train_decoder(train, spelling, standardised, SHORT, seed, "cpu")
    expected, texts = plain_loop(train, test, SHORT, seed)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert write(decoder, standardised(test.tokens.values), spelling) == texts
    scores = probe_layer(train, test, SHORT, seed + 2, "cpu")
    right = sum(text == true for text, true in zip(texts, test.captions, strict=True))
    assert scores["exact_match_by_seed"][seed] == right / len(texts)
    both = zip(*(plain_loop(train, test, SHORT, one)[1] for one in range(seed + 2)), strict=True)
    each = [sum(text == true for text in texts) / (seed + 2) for texts, true in zip(both, test.captions, strict=True)]
    pairs = sorted(zip(test.tokens.keys, each, strict=True))
    assert scores["outcomes"]["exact_match"] == {
        "keys": [key for key, _ in pairs],
        "values": pytest.approx([value for _, value in pairs]),
    }


def test_it_reads_what_is_there_and_nothing_else() -> None:
    """Oracle: by construction the letters stand in the tokens, or (signal 0) nowhere."""
    training = ReadTraining(samples=4800, width=32, layers=1, batch_size=16, lr=3e-3)
    train, test = written_in_tokens(200, 0), written_in_tokens(60, 1)
    blind = [written_in_tokens(len(one.rows), seed, signal=0) for seed, one in enumerate((train, test))]
    found = probe_layer(train, test, training, 2, "cpu")
    assert found["exact_match"] > 0.75
    assert found["exact_match"] == sum(found["exact_match_by_seed"]) / 2
    assert found["exact_match_std"] == pytest.approx(torch.tensor(found["exact_match_by_seed"]).std().item())
    assert found["by_kind"] == {"words": {**found["by_kind"]["words"], "pictures": 60}}
    assert probe_layer(*blind, training, 1, "cpu")["exact_match"] < 0.3
    assert json.loads(json.dumps(found)) == found


def test_torchs_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    train = written_in_tokens(8, 0)
    probe_layer(train, train, ReadTraining(8, 32, 1, 8, 1e-3), 1, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_spelling() -> None:
    """Oracle: frequent words are one token, all others are spelled, and what was written comes back."""
    spelling = Spelling(["the word Cat"] * 99 + ["the word dog 31"])
    assert spelling.pieces[4:] == [
        *"13acdeghortw",
        *(f"##{one}" for one in "13acdeghortw"),
        "31",
        "cat",
        "dog",
        "the",
        "word",
    ]
    spelled = Spelling([*(f"the {one}{two}{one}" for one in "abcdefghijkl" for two in "abcdefghijkl"), "the 31"])
    assert [spelled.pieces[one] for one in spelled.ids("The aba 3")] == [
        "[bos]",
        "the",
        "a",
        "##b",
        "##a",
        "3",
        "[eos]",
    ]
    for text in ("the aba", "aa 31 3", "the"):
        assert spelled.text(spelled.ids(text)) == text
    assert [spelled.pieces[one] for one in spelled.ids("z")] == ["[bos]", "[unknown]", "[eos]"]
    assert len(spelled.ids("a" * 200)) == 64
    assert spelled.ids("a" * 200)[-1] == EOS


def test_every_sample_is_seen_equally_often() -> None:
    order = batches(10, ReadTraining(30, 8, 1, 5, 1e-3), 0)
    assert [len(one) for one in order] == [5] * 6
    assert sorted(one for batch in order[:2] for one in batch) == list(range(10))
    assert order != batches(10, ReadTraining(30, 8, 1, 5, 1e-3), 1)


def test_a_set_without_captions_is_an_error() -> None:
    train = written_in_tokens(8, 0)
    with pytest.raises(UserError, match="no test sample has a caption"):
        probe_layer(train, Readable(train.tokens, [], [], []), SHORT, 1, "cpu")


def test_a_caption_goes_with_its_own_picture_where_keys_come_twice(tmp_path: Path) -> None:
    """Two tars with the same keys, the first picture of all broken. Oracle: the captions in file order."""
    tars = []
    for number, pictures in enumerate(((b"broken", encoded(1)), (encoded(2), encoded(3)))):
        tars.append(str(tmp_path / f"{number}.tar"))
        with wds.TarWriter(tars[-1]) as writer:
            for row, picture in enumerate(pictures):
                writer.write({"__key__": f"{row:04d}", "png": picture, "txt": f"caption {number} {row}"})
    data = "::".join(tars)
    model = PatchModel()
    model.preprocess, model.tokenizer = to_integers, None
    job = EvalJob(model, EvalOptions(data=data))
    found, skipped = job.readable(data, "tokens")
    assert found.captions == ["caption 0 1", "caption 1 0", "caption 1 1"]
    assert skipped["undecodable image"] == ["0000"]

"""Attentive probe. Oracle: attention written out in loops, a task that means cannot solve, repetition."""

from __future__ import annotations

import json
import math

import pytest
import torch
from probe_sets import features
from torch import Tensor

from open_clip_ov2.evaluate.attentive import AttentiveHead, AttentiveTraining, attentive_probe, standardiser
from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.probes import linear_probe

SHORT = AttentiveTraining(epochs=12, batch_size=32, lr=1e-2)


def marked(samples: int, seed: int, tokens: int = 12, width: int = 8) -> Features:
    """One token of each sample carries the mark 1 in channel 0 and its class in the sign of channel 1. The others have
    random signs there, their last one chosen so that the mean of channel 1 tells nothing: it is 0 in every sample.
    """
    generator = torch.Generator().manual_seed(seed)
    values_MND = 0.1 * torch.randn(samples, tokens, width, generator=generator)
    values_MND[..., 0] = 0
    signs_MN = torch.ones(tokens).repeat(samples, 1)
    signs_MN[:, tokens // 2 :] = -1
    order_MN = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(samples)])
    signs_MN = signs_MN.gather(1, order_MN)
    places = torch.randint(tokens, (samples, 1), generator=generator)
    values_MND[..., 1] = signs_MN
    values_MND[..., 0].scatter_(1, places, 1.0)
    labels = ["up" if sign > 0 else "down" for sign in signs_MN.gather(1, places).flatten().tolist()]
    return features(values_MND, labels)


def test_it_reads_one_marked_token_where_the_mean_tells_nothing() -> None:
    """Oracle: by construction the mean of the tokens does not depend on the class."""
    train, test = marked(512, 0), marked(128, 1)
    result = attentive_probe(train, test, training=SHORT)
    assert result["top1"] > 0.97
    means = [features(part.values.mean(dim=1), part.labels) for part in (train, test)]
    assert linear_probe(*means, regulariser=1.0)["top1"] < 0.65
    assert json.loads(json.dumps(result)) == result


def plain_logits(head: AttentiveHead, tokens_BND: Tensor) -> Tensor:
    """One sample, head and token at a time; sums and exponentials spelled out."""
    rows = []
    for tokens_ND in tokens_BND:
        keys_ND, values_ND = tokens_ND @ head.key.weight.T, tokens_ND @ head.value.weight.T
        width = tokens_ND.shape[1] // head.heads
        pooled = []
        for number in range(head.heads):
            part = slice(number * width, (number + 1) * width)
            scores = [(head.query_D[part] * key[part]).sum() / math.sqrt(width) for key in keys_ND]
            powers = torch.stack([score.exp() for score in scores])
            pooled.append(sum(p / powers.sum() * value[part] for p, value in zip(powers, values_ND, strict=True)))
        rows.append(head.classifier.weight @ torch.cat(pooled) + head.classifier.bias)
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (192, 3), (8, 1), (130, 2), (131, 1)])
def test_attention_and_its_gradient_are_the_written_out_ones(width: int, heads: int) -> None:
    """Oracle: loops in float64; autograd through them."""
    head = AttentiveHead(width, 3, torch.Generator().manual_seed(1)).double()
    assert head.heads == heads
    torch.nn.init.normal_(head.query_D, generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(head.key.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    tokens = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = torch.tensor([[1.0, -2, 3], [0.5, 1, -1]], dtype=torch.float64)
    gradients = []
    for logits in (head(tokens), plain_logits(head, tokens)):
        gradients.append(torch.autograd.grad((logits * weights).sum(), list(head.parameters())))
    torch.testing.assert_close(head(tokens), plain_logits(head, tokens))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_same_seed_gives_the_same_result_and_nobodys_generator_moves() -> None:
    """Oracle: repetition, another seed, torch's own generator; float16 tokens are taken too."""
    train, test = marked(64, 0), marked(32, 1)
    short = AttentiveTraining(epochs=2, batch_size=16)
    state = torch.get_rng_state()
    first = attentive_probe(train, test, training=short)
    assert torch.equal(torch.get_rng_state(), state)
    assert attentive_probe(train, test, training=short) == first
    other = AttentiveTraining(epochs=2, batch_size=16, seed=1)
    assert attentive_probe(train, test, training=other)["train_loss"] != first["train_loss"]
    half = [features(part.values.half(), part.labels) for part in (train, test)]
    assert attentive_probe(*half, training=short)["train_loss"] == pytest.approx(first["train_loss"], abs=1e-2)


def test_tokens_are_standardised_by_the_training_set() -> None:
    """Oracle: mean 0 and standard deviation 1 of its channels; a constant channel is 0; unused rows do not count."""
    values = 3 + 2 * torch.randn(100, 4, 5, generator=torch.Generator().manual_seed(0))
    values[..., 4] = 7
    values[90:] += 1e3
    taken = standardiser(values, torch.arange(90))(values[:90]).flatten(0, 1)
    torch.testing.assert_close(taken.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(taken.std(0, correction=0), torch.tensor([1.0, 1, 1, 1, 0]), atol=1e-5, rtol=0)

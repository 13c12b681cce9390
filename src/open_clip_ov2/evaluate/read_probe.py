"""Reading probe: how well a small fresh decoder reads through a frozen encoder.

A `TextDecoder` with cross-attention, the same for every encoder, is trained on frozen patch tokens to spell captions,
then writes those of held-out pictures. The protocol is ours (docs/evaluation.md). All draws depend on the seed alone.

Shapes: B batch, M samples, N image tokens, D width, L caption tokens, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.core import IGNORE_INDEX, DecoderConfig, TextDecoder, caption_targets
from open_clip_ov2.core.generate import CaptionStream, GenerationConfig, generate
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.attentive import BLOCK_ROWS, standardiser, train_steps
from open_clip_ov2.evaluate.eval_job import EvalJob, Readable
from open_clip_ov2.evaluate.extraction import Kind
from open_clip_ov2.evaluate.text.normalise import plain
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES
from open_clip_ov2.evaluate.text.reading import PICTURE_ERROR, reading_scores

HEAD_WIDTH = 32
FREQUENT = 1 / 100  # a word in that many of the training captions is one token, every other one is spelled
LONGEST = 64  # tokens of a caption at most
PAD, BOS, EOS, UNKNOWN = range(4)
INSIDE = "##"  # before a character that does not begin a word
LAYERS: Mapping[str, Kind] = {"last": "tokens", "penultimate": "penultimate"}
RATES = {"exact_match": ".1%", "character_error_rate": ".3f", PICTURE_ERROR: ".3f", "number_accuracy": ".1%"}


@dataclass(frozen=True)
class ReadTraining:
    """The decoder and what it is trained with; `layers` are pairs of self- and cross-attention."""

    samples: int
    width: int
    layers: int
    batch_size: int
    lr: float
    weight_decay: float = 0.01

    def decoder(self, image_width: int, vocab_size: int, seed: int) -> TextDecoder:
        """A fresh one, drawn on the CPU: the same on every device."""
        heads = max(1, self.width // HEAD_WIDTH)
        config = DecoderConfig(self.width, 2 * self.layers, heads, 4 * self.width, fusion="cross_attn")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TextDecoder(config, image_width, vocab_size)


class Spelling:
    """Text to ids and back: frequent words as they are, all others character by character; case aside."""

    def __init__(self, captions: Sequence[str]) -> None:
        words = [plain(caption).split() for caption in captions]
        counts = Counter(word for one in words for word in set(one))
        whole = sorted(word for word, count in counts.items() if count >= FREQUENT * len(captions) and len(word) > 1)
        letters = sorted({letter for word in counts for letter in word})
        self.pieces = ["[pad]", "[bos]", "[eos]", "[unknown]", *letters, *(INSIDE + one for one in letters), *whole]
        self._number = {piece: number for number, piece in enumerate(self.pieces)}

    def ids(self, caption: str) -> list[int]:
        """Bos, the caption, eos; at most LONGEST."""
        found = [BOS]
        for word in plain(caption).split():
            parts = [word] if word in self._number else [word[0], *(INSIDE + letter for letter in word[1:])]
            found += [self._number.get(part, UNKNOWN) for part in parts]
        return [*found[: LONGEST - 1], EOS]

    def text(self, ids: Iterable[int]) -> str:
        """What stands before the end of text."""
        written = ""
        for number in ids:
            if number == EOS:
                break
            if number > UNKNOWN:
                piece = self.pieces[number]
                written += piece.removeprefix(INSIDE) if piece.startswith(INSIDE) else f" {piece}"
        return written.strip()


def read_probe(job: EvalJob) -> dict[str, Any]:
    """By layer; at the top the last one's rates."""
    options, layers, skipped = job.options, {}, {}
    sizes = (options.read_samples, options.read_width, options.read_layers)
    training = ReadTraining(*sizes, options.read_batch, options.read_lr)
    assert options.train_data is not None
    for layer, kind in LAYERS.items():
        sets = [job.readable(data, kind) for data in (options.train_data, options.data)]
        layers[layer] = probe_layer(sets[0][0], sets[1][0], training, options.read_seeds, job.model.device)
        skipped = {"train": sets[0][1], "test": sets[1][1]}
    outcomes = {
        f"by_layer.{layer}.{path}": one for layer in LAYERS for path, one in layers[layer].pop(OUTCOMES).items()
    }
    outcomes |= {name: outcomes[f"by_layer.last.{name}"] for name in ("exact_match", PICTURE_ERROR)}
    rates = {name: layers["last"][name] for name in RATES}
    about = {"training": asdict(training), "seeds": options.read_seeds, "skipped_samples": skipped}
    return {**rates, "by_layer": layers, **about, OUTCOMES: outcomes}


def read_probe_line(found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    layers = [
        f"{layer} layer {_spread(row, 'exact_match')} exactly right, character error rate "
        f"{_spread(row, 'character_error_rate')}"
        for layer, row in found["by_layer"].items()
    ]
    return f"{'; '.join(layers)}, of {found['by_layer']['last']['pictures']:,} images"


def read_probe_table(found: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"kind": kind, "images": f"{last['pictures']:,}"}
        | {
            f"{name.replace('_', ' ')}, {layer} layer": _spread(rows["by_kind"][kind], name)
            for layer, rows in found["by_layer"].items()
            for name in RATES
            if name != PICTURE_ERROR
        }
        for kind, last in found["by_layer"]["last"]["by_kind"].items()
    ]


def _spread(row: Mapping[str, Any], name: str) -> str:
    """A mean over seeds and its standard deviation; nothing for a rate of nothing."""
    shown = [format(value, RATES[name]) for value in (row[name], row[f"{name}_std"]) if value is not None]
    return " ± ".join(shown)


def probe_layer(train: Readable, test: Readable, training: ReadTraining, seeds: int, device: Any) -> dict[str, Any]:
    """Rates of the test captions: mean over seeds and standard deviation (`_std`), by kind too; JSON-ready. Raises
    UserError if a set has no sample."""
    for name, one in (("training", train), ("test", test)):
        if not one.rows:
            raise UserError(f"no {name} sample has a caption and finite features; check --caption-keys and the model")
    scores = [_one_seed(train, test, training, seed, device) for seed in range(seeds)]
    return {
        **_over_seeds(scores),
        "by_kind": {kind: _over_seeds([score["by_kind"][kind] for score in scores]) for kind in scores[0]["by_kind"]},
        "train_loss": statistics.mean(score["train_loss"] for score in scores),
        OUTCOMES: _mean_outcomes([score[OUTCOMES] for score in scores]),
    }


def _one_seed(train: Readable, test: Readable, training: ReadTraining, seed: int, device: Any) -> dict[str, Any]:
    spelling = Spelling(train.captions)
    standardised = standardiser(train.tokens.values, torch.tensor(train.rows))
    decoder, losses = train_decoder(train, spelling, standardised, training, seed, device)
    written = []
    for rows in torch.tensor(test.rows).split(BLOCK_ROWS):
        written += write(decoder, standardised(test.tokens.values[rows]).to(device), spelling)
    keys = [test.tokens.keys[row] for row in test.rows]
    scores = reading_scores(zip(keys, test.kinds, test.captions, written, strict=True))
    return {**scores, "train_loss": statistics.mean(losses[-max(1, len(losses) // 20) :])}


def train_decoder(
    train: Readable,
    spelling: Spelling,
    standardised: Callable[[Tensor], Tensor],
    training: ReadTraining,
    seed: int,
    device: Any,
) -> tuple[TextDecoder, list[float]]:
    """A trained decoder and the loss of each step, in nats per token."""
    decoder = training.decoder(train.tokens.values.shape[-1], len(spelling.pieces), seed).to(device)
    ids = [torch.tensor(spelling.ids(caption)) for caption in train.captions]

    def loss_of(chosen: list[int]) -> Tensor:
        texts_BL = torch.nn.utils.rnn.pad_sequence([ids[one] for one in chosen], True, PAD).to(device)
        tokens_BND = standardised(train.tokens.values[[train.rows[one] for one in chosen]]).to(device)
        logits_BPV = decoder.lm_head(decoder(tokens_BND, texts_BL[:, :-1]))
        targets_BP = caption_targets(texts_BL, EOS)
        return F.cross_entropy(logits_BPV.flatten(0, 1), targets_BP.flatten(), ignore_index=IGNORE_INDEX)

    order = batches(len(ids), training, seed)
    return decoder, train_steps(decoder, order, loss_of, training.lr, training.weight_decay)


def batches(samples: int, training: ReadTraining, seed: int) -> list[list[int]]:
    """Which samples each step sees: pass after pass in random order, whole batches."""
    steps = math.ceil(training.samples / training.batch_size)
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(steps * training.batch_size / samples)
    order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])
    return order[: steps * training.batch_size].view(steps, training.batch_size).tolist()


@torch.no_grad()
def write(decoder: TextDecoder, tokens_BND: Tensor, spelling: Spelling) -> list[str]:
    """What the decoder writes of each image, greedily."""
    bos_B1 = torch.full((len(tokens_BND), 1), BOS, device=tokens_BND.device)
    config = GenerationConfig(seq_len=LONGEST, eos_id=EOS, pad_id=PAD)
    out_BT = generate(CaptionStream(decoder, tokens_BND, bos_B1), bos_B1, config)
    return [spelling.text(row[1:]) for row in out_BT.tolist()]


def _over_seeds(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each rate and standard deviation (n - 1)."""
    found: dict[str, Any] = {"pictures": scores[0]["pictures"]}
    for name in RATES:
        values = [score[name] for score in scores if score[name] is not None]
        found[name] = statistics.mean(values) if values else None
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found[f"{name}_by_seed"] = values
    return found


def _mean_outcomes(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each rate of right or wrong that the probe reports: the share of seeds in which a picture is right."""
    return {
        path: {"keys": first["keys"], "values": np.mean([one[path]["values"] for one in by_seed], axis=0).tolist()}
        for path, first in by_seed[0].items()
        if path.rpartition(".")[2] in RATES
    }

"""Caption generation with a key-value cache: greedy, top-k, top-p, beam.

Shapes: B batch, W beams, T generated length so far (bos included), V vocabulary, k the largest top_k of the batch.
Every function takes a `CaptionStream`, which hides the decoder and its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.core.decoder import TextDecoder
from open_clip_ov2.core.rows import KeyValue
from open_clip_ov2.core.tokens import gather_tokens

GenerationType = Literal["greedy", "top_k", "top_p", "beam_search"]
GENERATION_TYPES: tuple[str, ...] = get_args(GenerationType)


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate. `seq_len` and `min_seq_len` count tokens, bos and eos included."""

    seq_len: int
    eos_id: int
    pad_id: int
    generation_type: GenerationType = "greedy"
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    num_beams: int = 4
    length_penalty: float = 1.0  # a finished beam's log probability is divided by its length to this power
    min_seq_len: int = 0
    repetition_penalty: float = 1.0  # CTRL, arXiv 1909.05858, section 4.1
    num_captions: int = 1  # for each image: as many samples of top_k and top_p, or the best beams
    generator: torch.Generator | None = None
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None  # (ids so far, logits) -> logits, as RowSampler

    def __post_init__(self) -> None:
        most_captions = {"greedy": 1, "beam_search": self.num_beams}.get(self.generation_type, self.num_captions)
        for message, fine in (
            (f"generation_type is one of {', '.join(GENERATION_TYPES)}", self.generation_type in GENERATION_TYPES),
            ("temperature must be > 0", self.temperature > 0),
            ("top_k must be at least 1", self.top_k >= 1),
            ("top_p must lie in (0, 1]", 0 < self.top_p <= 1),
            ("num_beams must be at least 1", self.num_beams >= 1),
            ("seq_len must be at least 2", self.seq_len >= 2),
            (f"min_seq_len must not exceed seq_len, {self.seq_len}", self.min_seq_len <= self.seq_len),
            ("repetition_penalty must be > 0", self.repetition_penalty > 0),
            ("num_captions must be at least 1", self.num_captions >= 1),
            ("num_captions must be 1 for greedy, and at most num_beams", self.num_captions <= most_captions),
        ):
            if not fine:
                raise ValueError(f"{message}; got {getattr(self, message.split()[0])!r}")


class CaptionStream:
    """The decoder on one batch while it generates: the last logits, and its cache."""

    def __init__(self, decoder: TextDecoder, image_tokens_BKD: Tensor, ids_BT: Tensor) -> None:
        self._decoder, self._cache = decoder, decoder.image_cache(image_tokens_BKD)
        self.advance(ids_BT)

    def advance(self, ids_BT: Tensor) -> None:
        """More tokens of each row, int64."""
        hidden_BD, self._cache = self._decoder.extend(ids_BT, self._cache)
        self.logits_BV = self._decoder.lm_head(hidden_BD).float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, `(B',)` int64, of the batch."""
        self._cache = [KeyValue(*(part.index_select(0, rows) for part in entry)) for entry in self._cache]
        self.logits_BV = self.logits_BV.index_select(0, rows)


def generate(stream: CaptionStream, ids_BT: Tensor, config: GenerationConfig) -> Tensor:
    """Continue `ids_BT` (int64, no padding) to at most `config.seq_len` tokens, pad after eos: `(B, T)`, or
    `(B * num_captions, T)` with those of an image side by side, the best beam first."""
    if config.generation_type == "beam_search" and config.num_beams > 1:
        return _beam_search(stream, ids_BT, config)
    if config.num_captions > 1:
        rows = torch.arange(len(ids_BT), device=ids_BT.device).repeat_interleave(config.num_captions)
        stream.select(rows)
        ids_BT = ids_BT[rows]
    finished_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    while ids_BT.shape[1] < config.seq_len:
        next_B = _pick(_adjust(stream.logits_BV, ids_BT, config), config)
        next_B = next_B.masked_fill(finished_B, config.pad_id)
        ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
        finished_B = finished_B | (next_B == config.eos_id)
        if ids_BT.shape[1] == config.seq_len or bool(finished_B.all()):
            break
        stream.advance(next_B[:, None])
    return ids_BT


def _adjust(logits_BV: Tensor, ids_BT: Tensor, config: GenerationConfig) -> Tensor:
    """Repetition penalty, no end of text before `min_seq_len`, then the caller's own processor."""
    logits_BV = logits_BV.clone()
    if config.repetition_penalty != 1.0:
        seen = logits_BV.gather(1, ids_BT)
        penalised = torch.where(seen < 0, seen * config.repetition_penalty, seen / config.repetition_penalty)
        logits_BV.scatter_(1, ids_BT, penalised)
    if ids_BT.shape[1] + 1 < config.min_seq_len:
        logits_BV[:, config.eos_id] = -torch.inf
    return logits_BV if config.logits_processor is None else config.logits_processor(ids_BT, logits_BV)


def _pick(logits_BV: Tensor, config: GenerationConfig) -> Tensor:
    if config.generation_type in ("greedy", "beam_search"):  # a beam of one is greedy, as in transformers
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV / config.temperature
    if config.generation_type == "top_k":
        values, ids = logits_BV.topk(min(config.top_k, logits_BV.shape[1]), dim=-1)
    else:
        values, ids = logits_BV.sort(dim=-1, descending=True)
        probabilities = values.softmax(dim=-1)
        # Keep the smallest set whose mass reaches top_p: drop what starts beyond it.
        values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= config.top_p, -torch.inf)
    choice = torch.multinomial(values.softmax(dim=-1), 1, generator=config.generator)
    return ids.gather(1, choice)[:, 0]


def _beam_search(stream: CaptionStream, ids_BT: Tensor, config: GenerationConfig) -> Tensor:
    (batch, prompt), width = ids_BT.shape, config.num_beams
    rows_B1 = torch.arange(batch, device=ids_BT.device)[:, None]
    stream.select(rows_B1.expand(-1, width).flatten())
    ids_BWT = F.pad(ids_BT, (0, config.seq_len - prompt), value=config.pad_id)[:, None].repeat(1, width, 1)
    finished_BW = torch.full((batch, width), -torch.inf, device=ids_BT.device)
    finished_ids = ids_BWT
    alive_BW = finished_BW.clone()
    alive_BW[:, 0] = 0.0  # all beams start equal: only the first of each example may branch at the first step
    for length in range(prompt, config.seq_len):
        scores, beams, tokens = _expand(stream, ids_BWT[:, :, :length], alive_BW, config)
        grown = gather_tokens(ids_BWT, beams)
        grown[:, :, length] = tokens
        ended = tokens == config.eos_id
        divisor = float(length + 1 - prompt) ** config.length_penalty
        alive_BW, keep_BW = scores.masked_fill(ended, -torch.inf).topk(width, dim=1)
        ids_BWT = gather_tokens(grown, keep_BW)
        ends = [(finished_BW, finished_ids), ((scores / divisor).masked_fill(~ended, -torch.inf), grown)]
        last = length + 1 == config.seq_len
        if last:
            ends.append((alive_BW / divisor, ids_BWT))
        finished_BW, best_BW = torch.cat([end for end, _ in ends], dim=1).topk(width, dim=1)
        finished_ids = gather_tokens(torch.cat([ids for _, ids in ends], dim=1), best_BW)
        if last or bool((finished_BW.min(dim=1).values >= alive_BW.max(dim=1).values / divisor).all()):
            break
        stream.select((rows_B1 * width + beams.gather(1, keep_BW)).flatten())
        stream.advance(ids_BWT[:, :, length].reshape(-1, 1))
    best_BT = finished_ids[:, : config.num_captions].flatten(0, 1)
    is_eos = best_BT == config.eos_id
    lengths = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1) + 1, config.seq_len)
    return best_BT[:, : int(lengths.max())]


def _expand(
    stream: CaptionStream, ids: Tensor, alive: Tensor, config: GenerationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The 2W best continuations of each example: scores, beam and token of each, `(B, 2W)`."""
    batch, width, length = ids.shape
    logits_BV = _adjust(stream.logits_BV, ids.reshape(batch * width, length), config)
    totals = alive[..., None] + logits_BV.log_softmax(dim=-1).unflatten(0, (batch, width))
    vocab = totals.shape[-1]
    scores, flat = totals.flatten(1).topk(min(2 * width, width * vocab), dim=1)
    return scores, flat // vocab, flat % vocab


# --- sampling whose noise belongs to a row, so that a caption does not depend on the batch it is generated in ----
# Top-k sampling (Fan et al. 2018, arXiv 1805.04833) by the Gumbel-max trick: argmax(logits / temperature - log E), with
# exponential noise E from the row's own generator. torch.multinomial draws from one generator for the whole batch.


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of one row are chosen; `top_k` = 1 is greedy. `seed` names its noise: 0 to 2^63 - 1."""

    top_k: int = 1
    temperature: float = 1.0
    seed: int = 0


class RowSampler:
    """Logits -> logits whose argmax is each row's choice: a `logits_processor` of ours and of transformers, for one
    generation: each call draws the noise of the next token."""

    def __init__(self, rows: Sequence[RowSampling]) -> None:
        self._rows = rows
        self._generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        self._temperatures_B1 = torch.tensor([[row.temperature] for row in rows])

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """`(B, V)` of any float dtype -> 0 at the choice of each row and -inf elsewhere."""
        most = min(max(row.top_k for row in self._rows), logits_BV.shape[1])
        values_Bk, tokens_Bk = logits_BV.float().topk(most, dim=-1)
        noise_Bk = torch.full((len(self._rows), most), torch.inf)
        for noise_k, row, generator in zip(noise_Bk, self._rows, self._generators, strict=True):
            drawn = noise_k[: row.top_k]
            drawn.copy_(torch.empty(len(drawn)).exponential_(generator=generator).log() if row.top_k > 1 else 0.0)
        device = logits_BV.device
        scores_Bk = values_Bk / self._temperatures_B1.to(device) - noise_Bk.to(device)
        choice_B1 = tokens_Bk.gather(1, scores_Bk.argmax(dim=-1, keepdim=True))
        return torch.full_like(logits_BV, -torch.inf).scatter_(1, choice_B1, 0.0)

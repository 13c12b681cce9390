"""Sampling whose noise belongs to a row, so that a caption does not depend on the batch that it is generated in.

Shapes: B batch, T tokens so far, V vocabulary, k the largest top_k of the batch.
Top-k sampling (Fan et al. 2018, arXiv 1805.04833): the next token is drawn from the k likeliest in proportion to
softmax(logits / temperature). It is drawn by the Gumbel-max trick: argmax(logits / temperature - log E), where E is
exponential noise from the row's own generator. torch.multinomial draws from one generator for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSampling:
    """How the tokens of one row are chosen; `top_k` = 1 is greedy. `seed` names its noise: 0 to 2^63 - 1."""

    top_k: int = 1
    temperature: float = 1.0
    seed: int = 0


class RowSampler:
    """Logits -> logits whose argmax is each row's choice: a `logits_processor` of ours and of transformers.

    It is for one generation: each call draws the noise of the next token.
    """

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

"""Attentive probe: one cross-attention of a learned query over frozen patch tokens, and a linear classifier.

As in AIM (arXiv 2401.08541), after CAE (arXiv 2202.03026): tokens standardized by channel, keys and values projected
without bias, the query a parameter without a projection of its own.

Shapes: B batch, M samples, N image tokens, D width, H heads, E width of a head, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.evaluate.classes import match_labels, ranks
from open_clip_ov2.evaluate.extraction import Features

HEAD_WIDTH = 64  # as in every ov2 ViT
INIT_STD = 0.02  # a ViT's
MIN_STD = 1e-6  # a channel that never changes stays 0
BLOCK_ROWS = 64  # samples at a time where nothing is trained
WARMUP_SHARE = 0.1  # of the steps


@dataclass(frozen=True)
class AttentiveTraining:
    """The numbers are ours: papers tune them for each data set."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0


class AttentiveHead(nn.Module):
    """Standardized tokens `(B, N, D)` -> logits `(B, C)`."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.query_D = nn.Parameter(torch.empty(width))
        empty = nn.utils.skip_init  # nn.Linear would draw from torch's own generator
        self.key = empty(nn.Linear, width, width, bias=False)
        self.value = empty(nn.Linear, width, width, bias=False)
        self.classifier = empty(nn.Linear, width, num_classes)
        nn.init.zeros_(self.classifier.bias)
        for weight in (self.query_D, self.key.weight, self.value.weight, self.classifier.weight):
            nn.init.trunc_normal_(weight, std=INIT_STD, generator=generator)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        # Written out: one query needs no fused kernel, and this backward is deterministic on every device.
        split = (self.heads, tokens_BND.shape[-1] // self.heads)
        keys_BNHE = self.key(tokens_BND).unflatten(-1, split)
        values_BNHE = self.value(tokens_BND).unflatten(-1, split)
        scores_BNH = (keys_BNHE * self.query_D.view(split)).sum(-1) / math.sqrt(split[1])
        pooled_BHE = (scores_BNH.softmax(dim=1)[..., None] * values_BNHE).sum(dim=1)
        return self.classifier(pooled_BHE.flatten(1))


def standardiser(values_MND: Tensor, rows_M: Tensor) -> Callable[[Tensor], Tensor]:
    """Standardizes tokens by mean and standard deviation of each channel over the tokens of `rows_M`; float32."""
    sums_2D = torch.zeros(2, values_MND.shape[-1], dtype=torch.float64)
    for block in rows_M.split(BLOCK_ROWS):
        tokens = values_MND[block].double().flatten(0, 1)
        sums_2D += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)])
    mean_D, square_D = sums_2D / (len(rows_M) * values_MND.shape[1])
    std_D = (square_D - mean_D.square()).clamp(min=MIN_STD**2).sqrt().float()
    return lambda values_BND: (values_BND.float() - mean_D.float()) / std_D


def attentive_probe(
    train: Features, test: Features, *, training: AttentiveTraining | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Accuracy on token features after the last epoch, JSON-ready. What is drawn depends on the seed and the training
    set's order alone. Raises UserError, see `match_labels`."""
    training, labels = training or AttentiveTraining(), match_labels(train, test)
    standardised, split = standardiser(train.values, labels.train.rows), labels.train
    generator = torch.Generator().manual_seed(training.seed)  # of the CPU: the same draws on every device
    head = AttentiveHead(train.values.shape[-1], len(labels.names), generator).to(device)
    epochs = [torch.randperm(len(split), generator=generator) for _ in range(training.epochs)]
    batches = [batch for epoch in epochs for batch in epoch.split(training.batch_size)]

    def loss_of(batch: Tensor) -> Tensor:
        logits_BC = head(standardised(train.values[split.rows[batch]]).to(device))
        return F.cross_entropy(logits_BC, split.classes_M[batch].to(device))

    losses = train_steps(head, batches, loss_of, training.lr, training.weight_decay)
    last = slice(-math.ceil(len(split) / training.batch_size), None)
    total = sum(loss * len(batch) for loss, batch in zip(losses[last], batches[last], strict=True))
    with torch.no_grad():
        blocks = labels.test.rows.split(BLOCK_ROWS)
        logits_MC = torch.cat([head(standardised(test.values[rows]).to(device)).cpu() for rows in blocks])
    result = labels.result(ranks(logits_MC, labels.test.classes_M))
    return {**result, "training": vars(training).copy(), "train_loss": total / len(split)}


def train_steps(
    module: nn.Module, batches: Sequence[Any], loss_of: Callable[[Any], Tensor], lr: float, weight_decay: float
) -> list[float]:
    """AdamW without weight decay of vectors, with linear warm-up and cosine to zero; the loss of each step."""
    steps = len(batches)
    matrices, others = ([one for one in module.parameters() if (one.ndim > 1) == wanted] for wanted in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    warmup = max(1, round(WARMUP_SHARE * steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule, losses = torch.optim.lr_scheduler.LambdaLR(optimizer, share), []
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()

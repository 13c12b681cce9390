"""Attentive probe: one cross-attention of a learned query over frozen patch tokens, and a linear classifier.

As in AIM (arXiv 2401.08541), after CAE (arXiv 2202.03026): tokens standardized by channel, keys and values projected
without bias, the query a parameter without a projection of its own, several heads, then the classifier. V-JEPA (arXiv
2404.08471) adds a residual and an MLP, which are not used here.

Shapes: B batch, M samples, N image tokens, D width, H heads, E width of a head, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.labels import match_labels, ranks

HEAD_WIDTH = 64  # as in every ov2 ViT
INIT_STD = 0.02  # a ViT's
MIN_STD = 1e-6  # a channel that never changes stays 0
BLOCK_ROWS = 64  # samples at a time where nothing is trained


@dataclass(frozen=True)
class AttentiveTraining:
    """AdamW, linear warm-up and cosine to zero. The numbers are ours: papers tune them for each data set."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.1
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
    train: Features,
    test: Features,
    *,
    training: AttentiveTraining | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy on token features, JSON-ready. What is drawn depends on the seed and the training set's order alone.

    The last epoch counts, no epoch is chosen. Raises UserError, see `match_labels`.
    """
    training, labels = training or AttentiveTraining(), match_labels(train, test)
    standardised, split = standardiser(train.values, labels.train.rows), labels.train
    generator = torch.Generator().manual_seed(training.seed)  # of the CPU: the same draws on every device
    head = AttentiveHead(train.values.shape[-1], len(labels.names), generator).to(device)
    optimizer, schedule = adamw(head, training, training.epochs * math.ceil(len(split) / training.batch_size))
    for _ in range(training.epochs):
        total = torch.zeros((), device=device)
        for chosen in torch.randperm(len(split), generator=generator).split(training.batch_size):
            logits_BC = head(standardised(train.values[split.rows[chosen]]).to(device))
            loss = F.cross_entropy(logits_BC, split.classes_M[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(chosen)
    with torch.no_grad():
        blocks = labels.test.rows.split(BLOCK_ROWS)
        logits_MC = torch.cat([head(standardised(test.values[rows]).to(device)).cpu() for rows in blocks])
    result = labels.result(ranks(logits_MC, labels.test.classes_M))
    return {**result, "training": vars(training).copy(), "train_loss": total.item() / len(split)}


class Rates(Protocol):
    """What `adamw` needs to know of a training."""

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def warmup_share(self) -> float: ...


def adamw(
    module: nn.Module, training: Rates, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without weight decay of vectors, with linear warm-up and cosine to zero."""
    matrices, others = ([one for one in module.parameters() if (one.ndim > 1) == wanted] for wanted in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)
    warmup = max(1, round(training.warmup_share * steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)

"""CLIP and CoCa through OpenCLIP's own step: its faults that are fixed, and how our monitor follows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from open_clip import CoCa
from torch import Tensor, nn

from open_clip_ov2.data.loader import Batch
from open_clip_ov2.data.skips import merge_counts
from open_clip_ov2.train.guard import StockGuard
from open_clip_ov2.train.step import StepReport, full_rate, windows

logger = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]  # images and texts


def init_coca_head(model: nn.Module) -> None:
    """Initialize the head of CoCa's decoder, which OpenCLIP makes by `torch.empty` and leaves so (docs/openclip.md)."""
    if isinstance(model, CoCa):
        head = model.text_decoder.text_projection
        nn.init.normal_(head, std=head.shape[0] ** -0.5)  # as its init_parameters would, which nobody calls
        logger.info("fixed: CoCa's decoder head, uninitialized in OpenCLIP 3.3, is drawn from normal(width^-0.5)")


class RecordedLoss(nn.Module):
    """OpenCLIP's loss, whose last values the monitor reads. With `--coca-contrastive-loss-weight 0` text features do
    not reach OpenCLIP's loss, and DDP fails at its second step: here they enter the loss with weight zero."""

    def __init__(self, inner: nn.Module, model: nn.Module, args: Any) -> None:
        super().__init__()
        self.inner = inner
        self.weights: dict[str, float] = {}  # the factors that `inner` multiplies its losses by
        if isinstance(model, CoCa):
            self.weights["contrastive_loss"] = args.coca_contrastive_loss_weight
            self.weights["caption_loss"] = args.coca_caption_loss_weight
        self.contrastive_off = self.weights.get("contrastive_loss") == 0
        self.last: dict[str, Tensor] = {}
        if self.contrastive_off:
            logger.info("fixed: CoCa with contrastive weight 0 keeps its text features in the graph, as DDP needs")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        losses = self.inner(*args, **kwargs)
        if self.contrastive_off:
            used = (kwargs["image_features"], kwargs["text_features"], kwargs["logit_scale"])
            losses["contrastive_loss"] = losses["contrastive_loss"] + sum(0.0 * value.sum() for value in used)
        self.last = {key: value.detach() for key, value in losses.items()}
        return losses

    def report(self) -> dict[str, Tensor]:
        """The last losses without their weights, and `loss`, their weighted sum."""
        losses = {name: value / (self.weights.get(name) or 1.0) for name, value in self.last.items()}
        return {**losses, "loss": torch.stack(list(self.last.values())).sum()}


class StockData:
    """An entry of `data` as OpenCLIP's loops want it, and its loader, in one: pairs of images and texts."""

    def __init__(self, pairs: Iterable[Pair], num_batches: int | None, num_samples: int) -> None:
        self.dataloader, self._pairs = self, pairs
        self.num_batches, self.num_samples = num_batches, num_samples

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def set_epoch(self, epoch: int) -> None:
        """The loader is at its epoch already."""


def _pairs(batches: Iterable[Batch]) -> Iterator[Pair]:
    return ((cast(Tensor, batch.images_BCHW), batch.texts_BL) for batch in batches)


def stock_epoch(
    stock: Callable[..., None],
    model: nn.Module,
    loader: Any,
    loss: RecordedLoss,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    *rest: Any,
    after_step: Callable[[StepReport], None],
) -> None:
    """OpenCLIP's own train_one_epoch over our loader; `rest`: its scaler, scheduler, dist_model and args."""
    guard = StockGuard(optimizer)

    def batches() -> Iterator[Batch]:
        start = time.perf_counter()
        for window in windows(loader, rest[-1].accum_freq):
            wait_s = time.perf_counter() - start
            guard.expect(rest[0])
            yield from window  # OpenCLIP's step runs while the last one waits here
            report = StepReport(
                losses=loss.report(),
                lr=full_rate(optimizer),
                grad_norm=None,
                bad=guard.bad,
                keys=[key for batch in window for key in batch.keys],
                num_tokens=None,
                wait_s=wait_s,
                step_s=time.perf_counter() - start,
                skipped=merge_counts(batch.skipped for batch in window),
            )
            after_step(report)
            model.train()  # a validation in between has left it in evaluation mode
            start = time.perf_counter()

    try:
        data = {"train": StockData(_pairs(batches()), loader.num_batches, loader.num_samples)}
        stock(model, data, loss, epoch, optimizer, *rest, tb_writer=None)
    finally:
        guard.close()


def stock_metrics(
    stock: Callable[..., dict[str, float]],
    model: nn.Module,
    data: dict[str, Any],
    epoch: int,
    args: Any,
    tokenizer: Any,
) -> dict[str, float]:
    """OpenCLIP's own validation metrics of the whole set, computed on rank 0; OpenCLIP logs none of them."""
    if "val" not in data:
        return {}
    view = SimpleNamespace(**{**vars(args), "save_logs": False, "wandb": False, "distributed": False})
    loader = data["val"].dataloader
    seen = {"val": StockData(_pairs(loader.full()), None, loader.num_samples)}
    metrics = stock(getattr(model, "module", model), seen, epoch, view, None, tokenizer)  # without DDP
    return {key: float(value) for key, value in metrics.items() if key not in ("epoch", "num_samples")}

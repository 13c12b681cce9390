"""CLIP and CoCa through OpenCLIP's own step: its faults that are fixed, and how our monitor follows it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from open_clip import CoCa
from torch import Tensor, nn

from open_clip_ov2.data.loader import Batch
from open_clip_ov2.data.skips import merge_counts
from open_clip_ov2.train.guard import StockGuard
from open_clip_ov2.train.step import StepReport

logger = logging.getLogger(__name__)


def init_coca_head(model: nn.Module) -> None:
    """Initialize the head of CoCa's decoder, which OpenCLIP makes by `torch.empty` and leaves so (docs/openclip.md)."""
    if isinstance(model, CoCa):
        head = model.text_decoder.text_projection
        nn.init.normal_(head, std=head.shape[0] ** -0.5)  # as its init_parameters would, which nobody calls
        logger.info("fixed: CoCa's decoder head, uninitialized in OpenCLIP 3.3, is drawn from normal(width^-0.5)")


class RecordedLoss(nn.Module):
    """OpenCLIP's loss, whose last values the monitor reads.

    With `--coca-contrastive-loss-weight 0` (`contrastive_off`) text features do not reach OpenCLIP's loss, and DDP
    fails at its second step: here they enter the loss with weight zero.
    """

    def __init__(self, inner: nn.Module, contrastive_off: bool, weights: dict[str, float]) -> None:
        """`weights`: the factor that `inner` multiplies each loss by."""
        super().__init__()
        self.weights = weights
        self.inner = inner
        self.contrastive_off = contrastive_off
        self.last: dict[str, Tensor] = {}
        if contrastive_off:
            logger.info("fixed: CoCa with contrastive weight 0 keeps its text features in the graph, as DDP needs")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        losses = self.inner(*args, **kwargs)
        if self.contrastive_off:
            used = (kwargs["image_features"], kwargs["text_features"], kwargs["logit_scale"])
            losses["contrastive_loss"] = losses["contrastive_loss"] + sum(0.0 * value.sum() for value in used)
        self.last = {key: value.detach() for key, value in losses.items()}
        return losses


class StockFeed:
    """Our loader as OpenCLIP's loop wants it: pairs of images and texts.

    OpenCLIP's step runs while this iterator waits at its `yield`. `after_step` is called when the next batch is asked
    for.
    """

    def __init__(
        self,
        loader: Any,
        accum_freq: int,
        loss: RecordedLoss,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        after_step: Callable[[StepReport], None],
    ) -> None:
        self.loader = loader
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples
        self._accum_freq = accum_freq
        self._loss, self._optimizer, self._model, self._after_step = loss, optimizer, model, after_step
        self._guard = StockGuard(optimizer)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        window, wait_s, begin = [], 0.0, time.perf_counter()
        asked = begin
        for batch in self.loader:
            wait_s += time.perf_counter() - asked
            window.append(batch)
            yield batch.images_BCHW, batch.texts_BL
            if len(window) == self._accum_freq:
                self._after_step(self._report(window, wait_s, time.perf_counter() - begin))
                self._model.train()  # a validation in between has left it in evaluation mode
                window, wait_s, begin = [], 0.0, time.perf_counter()
            asked = time.perf_counter()

    def _report(self, window: list[Batch], wait_s: float, step_s: float) -> StepReport:
        weighted = self._loss.last
        losses = {name: value / (self._loss.weights.get(name) or 1.0) for name, value in weighted.items()}
        losses["loss"] = torch.stack(list(weighted.values())).sum() if weighted else torch.tensor(0.0)
        return StepReport(
            losses=losses,
            lr=self._optimizer.param_groups[0]["lr"],
            grad_norm=None,
            bad=self._guard.bad,
            keys=[key for batch in window for key in batch.keys],
            num_tokens=None,
            wait_s=wait_s,
            step_s=step_s,
            skipped=merge_counts(batch.skipped for batch in window),
        )

    def close(self) -> None:
        self._guard.close()


def stock_epoch(stock: Callable[..., None], feed: StockFeed, *args: Any, steps_done: int, run_args: Any) -> None:
    """OpenCLIP's own train_one_epoch over our feed, with the learning rate after `steps_done` steps of the epoch."""
    model, loss, epoch, optimizer, scaler, scheduler, dist_model = args
    data = {"train": SimpleNamespace(dataloader=feed, set_epoch=lambda _: None)}
    resumed = scheduler and (lambda step: scheduler(step + steps_done))
    try:
        stock(model, data, loss, epoch, optimizer, scaler, resumed, dist_model, run_args, tb_writer=None)
    finally:
        feed.close()


def stock_metrics(
    stock: Callable[..., dict[str, float]],
    model: nn.Module,
    loader: Any,
    data: dict[str, Any],
    epoch: int,
    args: Any,
    tokenizer: Any,
) -> dict[str, float]:
    """OpenCLIP's own validation metrics of the whole set, computed on rank 0; OpenCLIP logs none of them."""

    class Pairs:
        num_samples = loader.num_samples if loader is not None else 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return ((batch.images_BCHW, batch.texts_BL) for batch in loader.full())

    view = SimpleNamespace(**vars(args))
    view.save_logs, view.wandb = False, False
    seen = {key: value for key, value in data.items() if key not in ("train", "val")}
    if loader is not None:
        seen["val"] = SimpleNamespace(dataloader=Pairs())
    metrics = stock(model, seen, epoch, view, None, tokenizer)
    return {key: float(value) for key, value in metrics.items() if key not in ("epoch", "num_samples")}

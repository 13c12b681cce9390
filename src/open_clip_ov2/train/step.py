"""The training step of a caption model, and an epoch of such steps.

Shapes: B batch, L caption tokens. To accumulate, OpenCLIP's own step caches features and runs each forward pass twice,
which a contrastive loss needs and a caption loss does not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2.core import IGNORE_INDEX, CaptionLoss, caption_targets
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.native import NativeImages
from open_clip_ov2.core.rows import on_device
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.data.skips import merge_counts
from open_clip_ov2.train.guard import gradient_norm, not_finite, step_unless


@dataclass(frozen=True)
class StepReport:
    """One optimizer step; the device may still be computing its tensors. `keys` are those of this rank's samples,
    `skipped` counts bad samples by cause, and `entries` the entries of the schedule that the step took."""

    losses: Mapping[str, Tensor | float]
    lr: float
    grad_norm: Tensor | None
    bad: Tensor
    keys: Sequence[str]
    num_tokens: Tensor | None
    wait_s: float
    step_s: float
    skipped: Mapping[str, int]
    entries: int = 1


@dataclass(frozen=True)
class StepSettings:
    """A step has `accum_freq` batches, which are one entry of the schedule; or, with `tokens_per_step`, as many as have
    so many target tokens over all processes, and each batch is an entry."""

    compute: Compute
    accum_freq: int
    grad_clip_norm: float | None  # None: no clipping
    loss_weight: float  # of the caption loss, 2 in the reference (--coca-caption-loss-weight)
    contrastive_weight: float = 1.0  # of a model that has this loss too (--coca-contrastive-loss-weight)
    tokens_per_step: int | None = None

    def windows(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """The batches of each step."""
        if self.tokens_per_step is None:
            return windows(batches, self.accum_freq)
        return token_windows(batches, self.tokens_per_step, self.target_count)

    @cached_property
    def target_count(self) -> Callable[[Batch], int]:
        """Counts the target tokens in a batch of each process together. Processes ask on their CPUs, so no step waits
        for a device, and all of them accumulate alike. Made once, because its process group stays."""
        compute = self.compute
        group: Any = torch.distributed.new_group(backend="gloo") if compute.world_size > 1 else None

        def count(batch: Batch) -> int:
            targets = (caption_targets(batch.texts_BL, compute.eos_id) != IGNORE_INDEX).sum()
            if group is not None:
                torch.distributed.all_reduce(targets, group=group)
            return int(targets)

        return count


@dataclass
class StepResult:
    """Sums over the global batch, on the device, which may still be computing them."""

    nll: Tensor
    objective: Tensor
    num_targets: Tensor
    grad_norm: Tensor
    bad: Tensor  # boolean: something was not finite, and the update was skipped
    contrastive: Tensor | None = None  # a mean over the processes

    def losses(self, settings: StepSettings) -> dict[str, Tensor]:
        """`caption_loss`: nats per real target token. `loss`: what was minimized."""
        found, loss = {"caption_loss": self.nll / self.num_targets}, settings.loss_weight * self.objective
        loss = loss / self.num_targets
        if self.contrastive is not None:
            found["contrastive_loss"] = self.contrastive
            loss = loss + settings.contrastive_weight * self.contrastive
        return found | {"loss": loss}


def windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Groups of `size` batches, one optimizer step each; an incomplete last group is dropped."""
    iterator = iter(batches)
    while len(window := list(islice(iterator, size))) == size:
        yield window


def token_windows(batches: Iterable[Batch], tokens: int, num_targets: Callable[[Batch], int]) -> Iterator[list[Batch]]:
    """Batches until they have `tokens` target tokens, one optimizer step each; the last group has what is left."""
    window, total = list[Batch](), 0
    for batch in batches:
        window.append(batch)
        total += num_targets(batch)
        if total >= tokens:
            yield window
            window, total = [], 0
    if window:
        yield window


def optimizer_step(
    model: nn.Module,
    window: list[Batch],
    loss: CaptionLoss,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    settings: StepSettings,
) -> StepResult:
    """Forward and backward over the window, then one update, unless the gradient is not finite. It is that of the
    global batch whatever the number of processes and micro-batches: each sum is divided by the targets of all of them,
    and multiplied by the world size that DDP divides by. A contrastive loss is that of a whole batch, so with one there
    are no micro-batches."""
    contrastive, compute = loss.contrast is not None, settings.compute
    if contrastive and len(window) > 1:
        raise ValueError("a contrastive loss is not accumulated over micro-batches")
    captions = [compute.packed(batch.texts_BL, batch.images_BCHW) for batch in window]
    count = float(sum(packed.num_targets for packed in captions))
    num_targets = all_reduced(torch.full((), count, device=compute.device), compute)
    scale = settings.loss_weight * compute.world_size / num_targets
    optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(3, device=compute.device)
    for index, (batch, packed) in enumerate(zip(window, captions, strict=True)):
        images, packed = compute.pixels(batch.images_BCHW), packed.to(compute.device)
        with compute.attention(), _sync_only(model, index == len(window) - 1):
            with compute.autocast():
                more = {"text": batch.texts_BL.to(compute.device)} if contrastive else {}
                more |= _token_drop(model, batch, compute.device)
                sums = model(images, captions=packed, caption_loss=loss, **more)
                contrast = torch.zeros_like(sums.nll) if sums.contrastive is None else sums.contrastive
                weighted = sums.objective * scale + settings.contrastive_weight * contrast
            (weighted if scaler is None else scaler.scale(weighted)).backward()
        totals += torch.stack([sums.nll.detach(), sums.objective.detach(), contrast.detach()])
    grad_norm = _clipped_norm(model, optimizer, scaler, settings.grad_clip_norm)
    totals = all_reduced(totals, compute)
    bad = not_finite(totals, grad_norm, scaler)
    step_unless(optimizer, scaler, bad)
    if (after := getattr(inside_ddp(model), "after_step", None)) is not None:
        after()
    mean = totals[2] / compute.world_size if contrastive else None
    return StepResult(totals[0], totals[1], num_targets, grad_norm, bad, mean)


def inside_ddp(model: nn.Module) -> Any:
    return getattr(model, "module", model)


def _token_drop(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Options of the forward pass with which samples keep tokens of their own (--elastic)."""
    if batch.draw is None:
        return {}
    inner = inside_ddp(model)
    rows, columns = inner.visual.grid_size
    seeds = [seed & 0xFFFFFFFF for seed in batch.seeds]  # all that counts of them, and int64 holds it
    if isinstance(batch.images_BCHW, NativeImages):  # whose places are computed on the host
        seeds_B, tokens = torch.tensor(seeds), batch.images_BCHW.counts
    else:
        seeds_B, tokens = on_device(seeds, device), rows * columns
    drop: dict[str, Any] = inner.token_drop.of_samples(seeds_B, tokens, batch.draw)
    return drop


def all_reduced(value: Tensor, compute: Compute) -> Tensor:
    """The sum of `value` over all processes."""
    if compute.world_size > 1:
        torch.distributed.all_reduce(value)
    return value


def _sync_only(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP reduces gradients at the last micro-batch alone."""
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = getattr(model, "no_sync", None)
    return contextlib.nullcontext() if last or no_sync is None else no_sync()


def _clipped_norm(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, limit: float | None) -> Tensor:
    """Total gradient norm before clipping; clips if there is a limit."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(parameters)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def full_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the parameters that have all of it (--lr-layer-decay)."""
    return float(max(group["lr"] for group in optimizer.param_groups))


def train_epoch(
    model: nn.Module,
    loader: Any,
    loss: CaptionLoss,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    settings: StepSettings,
    before_step: Callable[[], None],
    after_step: Callable[[StepReport], None],
) -> None:
    """The remaining steps of an epoch. `before_step` sets the learning rate."""
    model.train()
    start = time.perf_counter()
    for window in settings.windows(loader):
        wait_s = time.perf_counter() - start
        before_step()
        result = optimizer_step(model, window, loss, optimizer, scaler, settings)
        after_step(
            StepReport(
                losses=result.losses(settings),
                lr=full_rate(optimizer),
                grad_norm=result.grad_norm,
                bad=result.bad,
                keys=[key for batch in window for key in batch.keys],
                num_tokens=result.num_targets,
                wait_s=wait_s,
                step_s=time.perf_counter() - start,
                skipped=merge_counts(batch.skipped for batch in window),
                entries=len(window) if settings.tokens_per_step else 1,
            )
        )
        model.train()  # a validation in between has left it in evaluation mode
        start = time.perf_counter()

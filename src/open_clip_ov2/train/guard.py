"""Steps with a non-finite loss or gradient are skipped on all ranks, counted and logged; too many end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.errors import RunFailed
from open_clip_ov2.train.parallel import gathered

logger = logging.getLogger(__name__)

KEYS_SHOWN = 8


class StepGuard:
    """Counts skipped steps. Whether a step was bad is read one step late, so that no step waits for the device. It
    depends on the reduced gradient, which is the same on all ranks, so all ranks count alike. `last_good` names the
    checkpoint to go back to."""

    def __init__(self, limit: int, last_good: Callable[[], str], in_a_row: int = 0) -> None:
        self.limit, self.in_a_row, self._last_good = limit, in_a_row, last_good
        self._pending: tuple[Tensor, Sequence[str], int] | None = None

    def note(self, bad: Tensor, keys: Sequence[str], samples_seen: int) -> None:
        """`bad`: a boolean scalar on the device; `keys` of this rank's samples in the step."""
        self.check()
        self._pending = (bad, keys, samples_seen)

    def check(self) -> None:
        """Read whether the last step was bad. Raises RunFailed after `limit` bad steps in a row."""
        if self._pending is None:
            return
        bad, keys, samples_seen = self._pending
        self._pending = None
        if not bool(bad):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        logger.warning(
            "non-finite loss or gradient at %s samples: step left out (%d in a row); its samples here: %s%s",
            f"{samples_seen:,}", self.in_a_row, ", ".join(keys[:KEYS_SHOWN]), more,
        )  # fmt: skip
        if self.in_a_row >= self.limit:
            raise RunFailed(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (--max-bad-steps); last good "
                f"checkpoint: {self._last_good()}; look at the samples named in out.log, or lower --lr"
            )


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, a scalar on their device, which is not waited for."""
    norm: Tensor = gathered(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    return norm


def not_finite(sums: Tensor, grad_norm: Tensor, scaler: Any) -> Tensor:
    """A boolean scalar on the device: whether a step is bad, from its reduced losses `sums` and its gradient.
    GradScaler finds its scale by fp16 gradients that overflow: it skips the step and halves the scale. Such a step is
    not bad while there is a scale to halve."""
    bad = ~torch.isfinite(sums).all()
    if scaler is not None and scaler.get_scale() > 1:
        return bad
    return bad | ~torch.isfinite(grad_norm)


def step_unless(optimizer: torch.optim.Optimizer, scaler: Any, bad: Tensor) -> None:
    """One optimizer step, skipped if `bad` (a boolean scalar on the device) is true. Fused optimizers read the flag on
    the device, as they do for GradScaler; others wait for it."""
    if scaler is not None:
        scaler.step(optimizer)  # decides itself, from the unscaled gradients
        scaler.update()
    elif all(group.get("fused") for group in optimizer.param_groups):
        fused: Any = optimizer
        fused.grad_scale, fused.found_inf = None, bad.float()
        try:
            optimizer.step()
        finally:
            del fused.grad_scale, fused.found_inf
    elif not bool(bad):
        optimizer.step()


class StockGuard:
    """The same for OpenCLIP's own step: a hook before `optimizer.step` removes bad gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.bad = torch.tensor(False)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def expect(self, scaler: Any) -> None:
        """Before each step: what stands if `scaler`, a GradScaler or None, leaves out `optimizer.step`, and the hook
        with it, because a gradient is not finite. As in `not_finite`, such a step is bad once the scale is at 1."""
        self.bad = torch.tensor(scaler is not None and scaler.get_scale() <= 1)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.bad = ~torch.isfinite(gradient_norm(parameters))
        if bool(self.bad):
            for parameter in parameters:
                parameter.grad = None  # an optimizer leaves alone what has no gradient

    def close(self) -> None:
        self._handle.remove()

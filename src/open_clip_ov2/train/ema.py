"""An exponential moving average of the weights: evaluated and saved, while training goes on from the last weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from open_clip_ov2.train.parallel import held


class WeightAverage:
    """Of the trained parameters `w` of a model, in float32: after each step `a <- decay * a + (1 - decay) * w`. It
    begins with `state`, as `state()` gave it, or else with the weights as they are."""

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._names, self._weights = list(trained), list(trained.values())
        begin = trained if state is None else state
        self._averages = [
            begin[name].detach().to(weight.device, torch.float32, copy=True) for name, weight in trained.items()
        ]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """After an optimizer step, one that was left out included."""
        weights = [held(weight.detach()).float() for weight in self._weights]
        self._average([held(average) for average in self._averages], weights, 0)

    def of(self, model: nn.Module, state: Mapping[str, Tensor]) -> WeightAverage:
        """The same for a copy of the model, with these averages themselves."""
        other, parameters = copy.copy(self), dict(model.named_parameters())
        other._weights = [parameters[name] for name in self._names]
        other._averages = [state[name] for name in self._names]
        return other

    def state(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, float32; not copies."""
        return dict(zip(self._names, self._averages, strict=True))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for its weights for a while, in its own precision; float32 is not copied."""
        own = [weight.data for weight in self._weights]
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.data = average.to(weight.dtype)
        try:
            yield
        finally:
            for weight, data in zip(self._weights, own, strict=True):
                weight.data = data

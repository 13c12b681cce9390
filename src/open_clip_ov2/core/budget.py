"""Activation checkpointing: what the backward pass computes again, whole blocks or what costs least for its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def called(function: Callable[..., Tensor], *arguments: Any, again: bool) -> Tensor:
    """The function's result; with `again` nothing inside is kept, and the backward pass calls it once more."""
    return checkpoint(function, *arguments, use_reentrant=False) if again else function(*arguments)


def within_budget(memory_budget: float) -> Callable[..., Any]:
    """A backend for torch.compile: its own, that keeps `memory_budget`, 0 to 1, of what it would keep for backward.

    0 keeps the inputs alone, 1 what it keeps by itself (torch._functorch.config.activation_memory_budget, which solves
    a knapsack of operators by their FLOPs and bytes). Raises ValueError.
    """
    if not 0.0 <= memory_budget <= 1.0:
        raise ValueError(f"memory_budget must lie in [0, 1], got {memory_budget}")

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._functorch import config  # here: importing inductor costs seconds
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=memory_budget):
            return compile_fx(graph, inputs)

    return backend

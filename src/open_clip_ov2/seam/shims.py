"""Small stand-ins for names that OpenCLIP's `main` uses (patches.RUN says why)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def optim_for(parameters: Callable[[], tuple[dict[str, nn.Parameter], set[str]]]) -> Any:
    """In the place of `torch.optim`: an AdamW that spares what the reference spares, in one fused kernel.

    `parameters()` gives the model's, by name, and the names that weight decay leaves alone.
    """

    def adamw(groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        named, spared_names = parameters()
        spared = {id(named[name]) for name in spared_names if name in named}
        plain, decayed = groups
        moved = [p for p in decayed["params"] if id(p) in spared]
        kept = [p for p in decayed["params"] if id(p) not in spared]
        groups = [{**plain, "params": plain["params"] + moved}, {**decayed, "params": kept}]
        return torch.optim.AdamW(groups, fused=True, **kwargs)

    return SimpleNamespace(AdamW=adamw)


def without_report_to(argv: list[str]) -> list[str]:
    """TensorBoard is written by our monitor; OpenCLIP must not open a second file beside it."""
    out, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == "--report-to":
            skip = True
        elif not word.startswith("--report-to="):
            out.append(word)
    return out


def ddp_on_any_device(original: type) -> Callable[..., nn.Module]:
    def distributed_data_parallel(module: nn.Module, device_ids: Any = None, **kwargs: Any) -> nn.Module:
        on_cpu = next(module.parameters()).device.type == "cpu"
        return original(module, device_ids=None if on_cpu else device_ids, **kwargs)

    return distributed_data_parallel

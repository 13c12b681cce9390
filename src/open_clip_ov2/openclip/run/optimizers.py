"""Small stand-ins for names that OpenCLIP's `main` uses (patches.RUN says why)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

# Matrices that are no map between hidden layers, which Muon's authors leave to AdamW.
NOT_HIDDEN = ("*embedding*", "*lm_head*", "*text_projection*", "*conv1*", "*logit_scale*")


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


def muon_for_hidden_matrices(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of timm's `create_optimizer_v2`: Muon moves the matrices between hidden layers, AdamW all else, by
    the same learning rate (Jordan et al. 2024; the size of an update is timm's default, Moonlight's rule, arXiv
    2502.16982, section 2.2, which keeps AdamW's learning rates). Raises UserError for a timm that cannot tell them
    apart.
    """

    def create(model: nn.Module, opt: str, **kwargs: Any) -> torch.optim.Optimizer:
        if "muon" in opt:
            if "fallback_list" not in inspect.signature(original).parameters:
                raise UserError(f"--opt timm/{opt}: needs timm 1.0.20 or newer")
            kwargs["fallback_list"] = NOT_HIDDEN
        return original(model, opt, **kwargs)

    return create


def carry_moments(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    """The moments of an earlier optimizer over the same parameters; those of another shape start anew."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fitting = {
        index: state
        for index, state in before["state"].items()
        if index < len(parameters)
        and all(value.ndim == 0 or value.shape == parameters[index].shape for value in state.values())
    }
    optimizer.load_state_dict({"state": fitting, "param_groups": optimizer.state_dict()["param_groups"]})
    logger.info("moments of %d of %d parameters carried over from the stage before", len(fitting), len(parameters))


def ddp_on_any_device(original: type, reduction: str = "fp32") -> Callable[..., nn.Module]:
    """`reduction`: "bf16" sends gradients between processes in bfloat16, half the bytes, and rounds them so."""

    def distributed_data_parallel(module: nn.Module, device_ids: Any = None, **kwargs: Any) -> nn.Module:
        ddp = wrapped(module, device_ids, **kwargs)
        if reduction == "bf16":
            ddp.register_comm_hook(None, bf16_compress_hook)
            logger.info("gradients are summed between processes in bfloat16")
        return ddp

    def wrapped(module: nn.Module, device_ids: Any, **kwargs: Any) -> Any:
        if next(module.parameters()).device.type != "cpu":
            return original(module, device_ids=device_ids, **kwargs)
        if not kwargs.get("static_graph"):
            # Otherwise DDP regroups its buckets after its first step, and the order in which more than two
            # processes are summed would depend on when a run was last resumed.
            kwargs["find_unused_parameters"] = True
        return original(module, **kwargs)

    return distributed_data_parallel

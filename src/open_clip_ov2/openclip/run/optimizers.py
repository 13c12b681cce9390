"""Optimizers and DDP as a run makes them, in the place of names that OpenCLIP's `main` uses (patches.RUN says why)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from open_clip_ov2.core.compute import cpu_multiplies_bfloat16
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip import patches

logger = logging.getLogger(__name__)

OF_FLAGS = ("weight_decay", "betas", "eps", "momentum")  # keys of a parameter group; lr is the schedule's
NEWTON_SCHULZ = ("timm.optim.muon", "zeropower_via_newtonschulz")
# Matrices that do not map one hidden layer to another, which Muon's authors leave to AdamW.
NOT_HIDDEN = ("*embedding*", "*lm_head*", "*text_projection*", "*conv1*", "*logit_scale*")


def adamw_for(
    parameters: Callable[[], tuple[dict[str, nn.Parameter], set[str]]],
) -> Callable[..., torch.optim.Optimizer]:
    """AdamW in one fused kernel, without weight decay where the reference has none.

    `parameters()` gives the model's parameters by name, and the names of those without weight decay.
    """

    def adamw(groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        named, names = parameters()
        without_decay = {id(named[name]) for name in names if name in named}
        plain, decayed = groups
        moved = [p for p in decayed["params"] if id(p) in without_decay]
        stay = [p for p in decayed["params"] if id(p) not in without_decay]
        groups = [{**plain, "params": plain["params"] + moved}, {**decayed, "params": stay}]
        return torch.optim.AdamW(groups, fused=True, **kwargs)

    return adamw


def muon_for_hidden_matrices(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of timm's `create_optimizer_v2`: Muon for the matrices between hidden layers, AdamW for the rest.

    Both take the same learning rate: timm scales Muon's updates by Moonlight's rule (arXiv 2502.16982, section 2.2).
    Raises UserError for a timm that cannot tell the matrices apart.
    """

    def create(model: nn.Module, opt: str, **kwargs: Any) -> torch.optim.Optimizer:
        if "muon" not in opt:
            return original(model, opt, **kwargs)
        if "fallback_list" not in inspect.signature(original).parameters:
            raise UserError(f"--opt timm/{opt}: needs timm 1.0.20 or newer")
        optimizer = original(model, opt, fallback_list=NOT_HIDDEN, **kwargs)
        if next(model.parameters()).device.type == "cpu" and not cpu_multiplies_bfloat16():
            patches.while_stepping(optimizer, NEWTON_SCHULZ, lambda timms: partial(timms, dtype=torch.float32))
        return optimizer

    return create


def with_hyperparameters(create: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer that loads its moments from a checkpoint, but no hyperparameters: those are of the flags, which may
    have changed (--override)."""

    def created(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(*args, **kwargs)
        made = [{key: group[key] for key in OF_FLAGS if key in group} for group in optimizer.param_groups]

        def restore(optimizer: torch.optim.Optimizer) -> None:
            for group, values in zip(optimizer.param_groups, made, strict=True):
                group.update(values)

        optimizer.register_load_state_dict_post_hook(restore)
        return optimizer

    return created


def carry_optimizer(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    """Load the state of the previous stage's optimizer; parameters of another shape start without."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fitting = {
        index: state
        for index, state in before["state"].items()
        if index < len(parameters)
        and all(value.ndim == 0 or value.shape == parameters[index].shape for value in state.values())
    }
    optimizer.load_state_dict({"state": fitting, "param_groups": optimizer.state_dict()["param_groups"]})
    logger.info("optimizer state of %d of %d parameters kept from the previous stage", len(fitting), len(parameters))


def ddp_on_any_device(original: type, reduction: str = "fp32") -> Callable[..., nn.Module]:
    """In the place of DistributedDataParallel. With `reduction` "bf16" processes exchange gradients in bfloat16."""

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
            # DDP would regroup its buckets after its first step otherwise, and the order in which it sums more than two
            # processes would depend on when the run was last resumed.
            kwargs["find_unused_parameters"] = True
        return original(module, **kwargs)

    return distributed_data_parallel

"""Optimizers and DDP as a run makes them, in the place of names that OpenCLIP's `main` uses (patches.RUN says why).

All parameter groups of a run are made by `Grouping`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm import optim as timm_optim
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from open_clip_ov2.core.compute import cpu_multiplies_bfloat16
from open_clip_ov2.core.vision import ImageModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip import patches
from open_clip_ov2.openclip.run.finetune import matching
from open_clip_ov2.train.parallel import on_whole

logger = logging.getLogger(__name__)

# Keys of a parameter group that are of the flags; lr is the schedule's.
OF_FLAGS = ("weight_decay", "betas", "eps", "momentum", "lr_scale")
NEWTON_SCHULZ = ("timm.optim.muon", "zeropower_via_newtonschulz")
# Matrices that do not map one hidden layer to another, which Muon's authors leave to AdamW.
NOT_HIDDEN = ("*embedding*", "*lm_head*", "*text_projection*", "*conv1*", "*logit_scale*")


class Grouping:
    """The parameter groups of a model (without DDP): no weight decay for what the model says and for --wd-exclude, and
    with `layer_decay` a rate by depth, as BEiT (arXiv 2106.08254) and MAE have it.

    Of L blocks of the vision tower, block i (from 1) has `layer_decay ** (L + 1 - i)` of the rate, what comes before
    them `layer_decay ** (L + 1)`, and the rest of the model all of it. Raises UserError for a tower without blocks.
    """

    def __init__(self, model: Any, wd_exclude: Sequence[str] = (), layer_decay: float | None = None) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        of_model: set[str] = getattr(model, "no_weight_decay", set)() if isinstance(model, ImageModel) else set()
        self.undecayed = of_model | matching("--wd-exclude", wd_exclude, list(self.names.values()))
        self.changes_timm = bool(wd_exclude) or layer_decay is not None
        self._scales: list[float] = []  # of what comes before the blocks, of each block, of the rest
        if layer_decay is not None:
            blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
            if blocks is None:
                raise UserError("--lr-layer-decay: needs OpenCLIP's own ViT, and this model's image tower is another")
            depths = range(len(blocks) + 1, -1, -1)
            self._scales = [layer_decay**depth for depth in depths]
            shown = [f"block {index} {scale:.3g}" for index, scale in enumerate(self._scales[1:-1])]
            logger.info(
                "--lr-layer-decay %g: of the learning rate, the vision tower has: embeddings %.3g, %s; the rest 1",
                layer_decay, self._scales[0], ", ".join(shown),
            )  # fmt: skip

    def undecayed_ids(self) -> set[int]:
        return {key for key, name in self.names.items() if name in self.undecayed}

    def by_depth(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        """Each group split by rate, lowest first; `lr_scale` is what the schedule's rate is multiplied by."""
        if not self._scales:
            return groups
        out = []
        for group in groups:
            parts: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                parts.setdefault(self._scale(self.names[id(parameter)]), []).append(parameter)
            out += [{**group, "params": parts[s], "lr_scale": s, "lr": lr * s} for s in sorted(parts)]
        return out

    def _scale(self, name: str) -> float:
        if (block := _BLOCK.match(name)) is not None:
            return self._scales[int(block[1]) + 1]
        return self._scales[0 if name.startswith(_BEFORE_BLOCKS) else -1]


_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.")
_BEFORE_BLOCKS = tuple(f"visual.{name}" for name in ("conv1", "class_embedding", "positional_embedding", "ln_pre"))


def adamw_for(grouping: Callable[[], Grouping], **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """In the place of AdamW, which gets two groups: without and with weight decay. `options` are further ones."""

    def adamw(groups: list[dict[str, Any]], **kwargs: Any) -> torch.optim.Optimizer:
        grouped, (plain, decayed) = grouping(), groups
        without_decay = grouped.undecayed_ids()
        moved = [p for p in decayed["params"] if id(p) in without_decay]
        stay = [p for p in decayed["params"] if id(p) not in without_decay]
        groups = [{**plain, "params": plain["params"] + moved}, {**decayed, "params": stay}]
        return torch.optim.AdamW(grouped.by_depth(groups, kwargs["lr"]), **options, **kwargs)

    return adamw


def timm_optimizer(original: Callable[..., Any], grouping: Callable[[], Grouping]) -> Callable[..., Any]:
    """In the place of timm's `create_optimizer_v2`, with Muon for the matrices between hidden layers alone, and AdamW
    for the rest. Both take the same learning rate: timm scales Muon's updates by Moonlight's rule (arXiv 2502.16982,
    section 2.2). Raises UserError for a timm that cannot tell the matrices apart."""

    def create(model: nn.Module, opt: str, **kwargs: Any) -> torch.optim.Optimizer:
        grouped, muon = grouping(), "muon" in opt
        if muon and "fallback_list" not in inspect.signature(original).parameters:
            raise UserError(f"--opt timm/{opt}: needs timm 1.0.20 or newer")
        fallback = {"fallback_list": NOT_HIDDEN} if muon else {}

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            without_decay = grouped.undecayed_ids()
            names = {name for name, parameter in model.named_parameters() if id(parameter) in without_decay}
            names |= getattr(model, "no_weight_decay", set)()
            of_timm: Any = timm_optim
            made = of_timm.param_groups_weight_decay(
                model, kwargs["weight_decay"], no_weight_decay_list=names, **fallback
            )
            return grouped.by_depth(made, kwargs["lr"])

        # DDP hides `no_weight_decay` from timm.
        own = grouped.changes_timm or (grouped.undecayed and kwargs["weight_decay"])
        optimizer = original(model, opt, **kwargs, **({"param_group_fn": groups} if own else fallback))
        on_cpu = next(model.parameters()).device.type == "cpu"
        if muon:
            more = {"dtype": torch.float32} if on_cpu and not cpu_multiplies_bfloat16() else {}
            patches.while_stepping(optimizer, NEWTON_SCHULZ, lambda timms: on_whole(partial(timms, **more)))
        return optimizer

    return create


def scaled_schedule(schedule: Callable[[int], float], optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """OpenCLIP's schedule, which gives all groups the same rate, with the groups' own scales."""

    def scheduled(step: int) -> float:
        lr = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return lr

    return scheduled


def with_hyperparameters(create: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer that loads its moments from a checkpoint, but no hyperparameters: those are of the flags, which may
    have changed (--override)."""

    def created(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(*args, **kwargs)
        made = [{key: group[key] for key in OF_FLAGS if key in group} for group in optimizer.param_groups]

        def restore(optimizer: torch.optim.Optimizer) -> None:
            for group, values in zip(optimizer.param_groups, made, strict=True):
                group.update(values)

        optimizer.register_load_state_dict_pre_hook(_check_groups)
        optimizer.register_load_state_dict_post_hook(restore)
        return optimizer

    return created


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises UserError for the state of an optimizer that has its parameters in other groups: torch goes by order."""
    before, now = ([len(group["params"]) for group in one] for one in (state["param_groups"], optimizer.param_groups))
    if before != now:
        raise UserError(
            "the optimizer's state is of other parameter groups (--lr-layer-decay, --wd-exclude, --freeze, "
            "--lock-image and --lora-rank make them); give these flags as before, or start another run (--name) from "
            "the checkpoint (--pretrained)"
        )


def carry_optimizer(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    """Load the state of the previous stage's optimizer; parameters of another shape start without. Raises UserError."""
    _check_groups(optimizer, before)
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
        on_cpu = next(module.parameters()).device.type == "cpu"
        if on_cpu and any(isinstance(each, nn.SyncBatchNorm) for each in module.modules()):
            raise UserError("--use-bn-sync: torch synchronizes batch norm on GPUs alone; leave the flag out")
        if on_cpu and not kwargs.get("static_graph"):
            # DDP would regroup its buckets after its first step otherwise, and the order in which it sums more than two
            # processes would depend on when the run was last resumed.
            kwargs["find_unused_parameters"] = True
        ddp: Any = original(module, device_ids=None if on_cpu else device_ids, **kwargs)
        if reduction == "bf16":
            ddp.register_comm_hook(None, bf16_compress_hook)
        return ddp

    return distributed_data_parallel

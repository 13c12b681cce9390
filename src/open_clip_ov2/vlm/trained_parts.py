"""What trains in a stage, in which precision and at which rate. All other parameters are frozen, by name.

What gets no gradient (an encoder's blocks after the feature layer, its final norm, its pooler) is frozen too, because
DistributedDataParallel would wait for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from open_clip_ov2.vlm.vlm_recipe import LANGUAGE_MODEL, PROJECTOR, TOWER, VlmStage

PREFIXES = {
    "model.vision_tower.": TOWER,
    "model.multi_modal_projector.": PROJECTOR,
    "model.image_newline": PROJECTOR,
    "model.language_model.": LANGUAGE_MODEL,
    "lm_head.": LANGUAGE_MODEL,
}


def part_of(name: str) -> str:
    """The part that a parameter of the model belongs to."""
    return next(part for prefix, part in PREFIXES.items() if name.startswith(prefix))


def freeze_others(model: Any, stage: VlmStage, half: torch.dtype | None) -> list[str]:
    """Let the stage's parts train in float32, and freeze the others, in `half` if it is given; names of what trains."""
    unused = unused_names(model) if TOWER in stage.trains else set()
    if model.config.projector_hidden_act == "linear":  # then the second layer is the identity (assemble.make_linear)
        unused |= {"model.multi_modal_projector.linear_2.weight", "model.multi_modal_projector.linear_2.bias"}
    trained = []
    for name, parameter in model.named_parameters():
        trains = part_of(name) in stage.trains and name not in unused
        parameter.requires_grad_(trains)
        parameter.data = parameter.data.to(torch.float32 if trains or half is None else half)
        trained += [name] if trains else []
    return trained


def unused_names(model: Any) -> set[str]:
    """Parameters of the encoder that the features do not depend on: found on a copy without memory, by a backward."""
    config, size = model.config, model.config.vision_config.image_size
    with torch.device("meta"):
        tower = type(model.model.vision_tower)(config.vision_config)
        outputs = tower(torch.zeros(1, 3, size, size), output_hidden_states=True)
        outputs.hidden_states[config.vision_feature_layer].sum().backward()
    return {f"model.vision_tower.{name}" for name, value in tower.named_parameters() if value.grad is None}


def groups(model: nn.Module, stage: VlmStage, decaying: set[str]) -> list[dict[str, Any]]:
    """The optimizer's groups: the encoder at its own rate; no weight decay but for `decaying`."""
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = part_of(name) == TOWER, name not in decaying
            found.setdefault(key, []).append(parameter)
    return [
        {
            "part": TOWER if tower else LANGUAGE_MODEL,
            "params": parameters,
            "lr": stage.tower_lr if tower and stage.tower_lr is not None else stage.lr,
            "weight_decay": 0.0 if spared else stage.weight_decay,
        }
        for (tower, spared), parameters in sorted(found.items())
    ]


def always_run_tower(model: Any) -> None:
    """Let a batch without pictures run encoder and projector on a blank one, with weight zero: their gradients are then
    zero instead of none, which DistributedDataParallel would wait for, and FSDP's ranks do the same work in each step
    (LLaVA's own rule: it gives rows without a picture a blank one)."""
    inner, config = model.model, model.config

    def with_blank(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not module.training or kwargs.get("pixel_values") is not None or kwargs.get("input_ids") is None:
            return args, kwargs
        embeddings = module.get_input_embeddings()(kwargs.pop("input_ids"))
        size, more = config.vision_config.image_size, {}
        blank = torch.zeros(1, 3, size, size, dtype=embeddings.dtype, device=embeddings.device)
        if hasattr(config, "image_grid_pinpoints"):  # LLaVA-NeXT: the picture, and its parts
            rows, columns = (side // size for side in config.image_grid_pinpoints[0])
            blank = blank.expand(1 + rows * columns, -1, -1, -1)[None]
            more = {"image_sizes": torch.tensor([config.image_grid_pinpoints[0]], device=embeddings.device)}
        features = module.get_image_features(pixel_values=blank, **more, return_dict=True).pooler_output
        nothing = sum(feature.sum() for feature in features) * 0.0
        return args, {**kwargs, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}

    inner.register_forward_pre_hook(with_blank, with_kwargs=True)

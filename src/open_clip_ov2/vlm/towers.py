"""Any vision encoder as a vision model of transformers, which LLaVA's classes take as they are.

Ours become a ViTModel; OpenCLIP's own towers (CLIP, CoCa) a CLIPVisionModel or, without a norm before their blocks
(`clip-of-NAME`), a ViTModel; timm's (SigLIP, ViT) a SiglipVisionModel or, with a class token, a ViTModel. What comes
after the blocks (pooling, projection) is left out, as LLaVA reads none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2 import training
from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import read_json
from open_clip_ov2.formats import hf
from open_clip_ov2.formats.encoder import Encoder, Preprocessing
from open_clip_ov2.formats.llava import VisionTower, library, vision_tower

Parts = Mapping[str, str | tuple[str, ...]]
_SIGLIP_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkv")
_VIT_ATTENTION = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
# Modules of a block of OpenCLIP's and timm's -> those of transformers; a tuple takes a joint projection apart.
_OPEN_CLIP_TO_CLIP: Parts = {
    "attn.in_proj": _SIGLIP_ATTENTION, "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
}  # fmt: skip
_OPEN_CLIP_TO_VIT: Parts = {
    "attn.in_proj": _VIT_ATTENTION, "attn.out_proj": "attention.output.dense", "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense", "ln_1": "layernorm_before", "ln_2": "layernorm_after",
}  # fmt: skip
_TIMM_TO_SIGLIP: Parts = {
    "attn.qkv": _SIGLIP_ATTENTION, "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "norm1": "layer_norm1", "norm2": "layer_norm2",
}  # fmt: skip
_TIMM_TO_VIT: Parts = {
    "attn.qkv": _VIT_ATTENTION, "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
}  # fmt: skip
TIMM = "timm:"
_KINDS = ("weight", "bias")


def open_tower(source: str, image_size: int | None = None) -> VisionTower:
    """The encoder `source`, in float32. Raises UserError.

    `source`: what `ov2 export` takes (a run's folder, a checkpoint, an exported folder, `hf-hub:NAME`), `NAME:TAG` of
    OpenCLIP's registry, `timm:NAME`, or the folder of a vision model of transformers.
    """
    if (Path(source) / "config.json").is_file() and not (Path(source) / "open_clip_config.json").is_file():
        return _of_transformers(Path(source))
    try:
        if source.startswith(TIMM):
            return _named_timm(source.removeprefix(TIMM), image_size)
        loaded = training.open_model(source, image_size=image_size)
        if isinstance(loaded.model, (CaptionModel, VisionModel)):
            return vision_tower(Encoder.of(loaded.model.visual, loaded.preprocess_cfg))
        visual: Any = getattr(loaded.model, "visual", None)
        preprocessing = Preprocessing.of(loaded.preprocess_cfg)
        if hasattr(visual, "trunk"):
            return of_timm(visual.trunk, preprocessing)
        return of_open_clip(visual, preprocessing)
    except _Unfit as error:
        raise UserError(
            f"{source}: {error}, which no vision model of transformers has; name another encoder"
        ) from error


class _Unfit(Exception):
    """What an encoder has that transformers' classes do not."""


def of_open_clip(visual: Any, preprocessing: Preprocessing) -> VisionTower:
    """OpenCLIP's VisionTransformer as a CLIPVisionModel or, without a norm before its blocks, a ViTModel."""
    state = {name: value.detach().float() for name, value in visual.state_dict().items()}
    if "transformer.resblocks.0.attn.in_proj_weight" not in state:
        raise _Unfit(f"{type(visual).__name__} is not a plain ViT")
    block, size = visual.transformer.resblocks[0], _square(visual.image_size)
    patch, transformers = _square(visual.patch_size), library()
    config = {
        "hidden_size": state["class_embedding"].shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }
    if "ln_pre.weight" in state:
        named = _clip_names(state)
        kind, made = transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**config)
    else:
        named = {
            "embeddings.cls_token": state["class_embedding"][None, None],
            "embeddings.position_embeddings": state["positional_embedding"][None],
            "embeddings.patch_embeddings.projection.weight": state["conv1.weight"],
            "embeddings.patch_embeddings.projection.bias": torch.zeros_like(state["class_embedding"]),
            **_blocks(state, "transformer.resblocks.", "encoder.layer.", _OPEN_CLIP_TO_VIT),
        }
        kind, made = transformers.ViTModel, transformers.ViTConfig(**config)
    return _tower(kind, made, named, preprocessing, size, patch, class_token=True)


def _clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    root = "vision_model."
    return {
        f"{root}embeddings.class_embedding": state["class_embedding"],
        f"{root}embeddings.patch_embedding.weight": state["conv1.weight"],
        f"{root}embeddings.position_embedding.weight": state["positional_embedding"],
        **{f"{root}pre_layrnorm.{kind}": state[f"ln_pre.{kind}"] for kind in _KINDS},
        **_blocks(state, "transformer.resblocks.", f"{root}encoder.layers.", _OPEN_CLIP_TO_CLIP),
    }


def of_timm(trunk: Any, preprocessing: Preprocessing) -> VisionTower:
    """timm's VisionTransformer as a SiglipVisionModel or, with a class token, as a ViTModel."""
    state = {name: value.detach().float() for name, value in trunk.state_dict().items()}
    if "blocks.0.attn.qkv.weight" not in state or getattr(trunk, "reg_token", None) is not None:
        raise _Unfit(f"{type(trunk).__name__} is not a plain ViT")
    if "norm_pre.weight" in state:
        raise _Unfit("it has a norm before its blocks")
    block, size = trunk.blocks[0], _square(trunk.patch_embed.img_size)
    patch, transformers = _square(trunk.patch_embed.patch_size), library()
    config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }
    if "cls_token" in state:
        named = _vit_names(state, (size // patch) ** 2)
        kind, made = transformers.ViTModel, transformers.ViTConfig(**config)
    else:
        named = _siglip_names(state)
        kind, made = transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**config, vision_use_head=False)
    return _tower(kind, made, named, preprocessing, size, patch, class_token="cls_token" in state)


def _vit_names(state: Mapping[str, Tensor], patches: int) -> dict[str, Tensor]:
    positions = state["pos_embed"]
    if positions.shape[1] == patches:  # the class token has no position: its own is zero
        positions = nn.functional.pad(positions, (0, 0, 1, 0))
    return {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": positions,
        **{f"embeddings.patch_embeddings.projection.{kind}": state[f"patch_embed.proj.{kind}"] for kind in _KINDS},
        **_blocks(state, "blocks.", "encoder.layer.", _TIMM_TO_VIT),
    }


def _siglip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    root = "vision_model."
    return {
        f"{root}embeddings.position_embedding.weight": state["pos_embed"][0],
        **{f"{root}embeddings.patch_embedding.{kind}": state[f"patch_embed.proj.{kind}"] for kind in _KINDS},
        **_blocks(state, "blocks.", f"{root}encoder.layers.", _TIMM_TO_SIGLIP),
    }


def _blocks(state: Mapping[str, Tensor], before: str, after: str, parts: Parts) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if name.startswith(before):
            index, _, rest = name.removeprefix(before).partition(".")
            theirs = next((one for one in parts if rest.startswith(one)), None)
            if theirs is None:
                raise _Unfit(f"its blocks have {rest}")
            found = parts[theirs]
            names = (found,) if isinstance(found, str) else found
            for module, piece in zip(names, value.chunk(len(names)), strict=True):
                out[f"{after}{index}.{module}.{rest.removeprefix(theirs)[1:]}"] = piece.clone()
    return out


def _tower(
    kind: Any, config: Any, state: dict[str, Tensor], preprocessing: Preprocessing, size: int, patch: int,
    *, class_token: bool,
) -> VisionTower:  # fmt: skip
    """What the state lacks is behind the blocks; all else has to be there."""
    model, report = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    behind = ("post_layernorm.", "layernorm.", "pooler.")
    lost = [name for name in report["missing_keys"] if not name.removeprefix("vision_model.").startswith(behind)]
    if lost or report["unexpected_keys"]:
        raise _Unfit(f"its weights do not fit {kind.__name__} ({', '.join([*lost, *report['unexpected_keys']][:3])})")
    settings = hf.image_settings((size, size), preprocessing)
    return VisionTower(model, settings, size, patch, class_token)


def _square(sides: Any) -> int:
    height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
    if height != width:
        raise _Unfit(f"its images or patches are {height} x {width}")
    return int(height)


def _activation(module: nn.Module) -> str:
    """transformers' name."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    names = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    if type(module).__name__ not in names:
        raise _Unfit(f"its activation is {type(module).__name__}")
    return names[type(module).__name__]


def _named_timm(name: str, image_size: int | None) -> VisionTower:
    import timm
    from timm.data.config import resolve_model_data_config

    try:
        sizes: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        model = timm.create_model(name, pretrained=True, **sizes)
    except Exception as error:  # an unknown name, no network, a model without a size
        raise UserError(f"{TIMM}{name}: cannot be loaded ({first_line(error)})") from error
    cfg = resolve_model_data_config(model)
    mode = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"
    return of_timm(model, Preprocessing(tuple(cfg["mean"]), tuple(cfg["std"]), mode))


def _of_transformers(folder: Path) -> VisionTower:
    """The vision model in a folder of transformers' format, alone or as a part (CLIP, SigLIP)."""
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        model = transformers.AutoModel.from_pretrained(
            folder, config=config, dtype="float32", local_files_only=True, trust_remote_code=False
        )
        size, patch = _square(config.image_size), _square(config.patch_size)
    except Exception as error:  # OSError, ValueError, safetensors' own, AttributeError of a model that is no ViT
        raise UserError(f"{folder}: no vision model that transformers opens ({first_line(error)})") from error
    names = [name for name, _ in model.named_parameters()]
    extra = sum(any(word in name for name in names) for word in ("cls_token", "class_embedding"))
    if any("register" in name for name in names):
        raise UserError(f"{folder}: LLaVA drops one class token, and {type(model).__name__} has register tokens too")
    wanted = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_resize")
    written = read_json(folder / "preprocessor_config.json", dict, "settings of an image processor")
    settings = {name: value for name, value in written.items() if name in wanted}
    settings.setdefault("crop_size", {"height": size, "width": size})
    settings.setdefault("do_center_crop", "shortest_edge" in settings.get("size", {}))
    return VisionTower(model, settings, size, patch, bool(extra))

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
from open_clip_ov2.formats.timm import PARTS as TIMM_PARTS

Parts = Mapping[str, str | tuple[str, str, str]]
# Of a block of CLIP's and SigLIP's in transformers; hf.PARTS has those of its ViT.
_CLIP_PARTS: Parts = {
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}  # fmt: skip
TIMM = "timm:"
_BLOCKS = "transformer.resblocks."


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
    if f"{_BLOCKS}0.attn.in_proj_weight" not in state:
        raise _Unfit(f"{type(visual).__name__} is not a plain ViT")
    block = visual.transformer.resblocks[0]
    config = {
        "num_attention_heads": block.attn.num_heads,
        "image_size": _square(visual.image_size),
        "patch_size": _square(visual.patch_size),
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }
    return _tower("CLIPVision" if "ln_pre.weight" in state else "ViT", config, state, preprocessing)


def of_timm(trunk: Any, preprocessing: Preprocessing) -> VisionTower:
    """timm's VisionTransformer as a SiglipVisionModel or, with a class token, as a ViTModel."""
    state = {_open_clip_name(name): value.detach().float() for name, value in trunk.state_dict().items()}
    plain = {f"{_BLOCKS}0.attn.in_proj.weight", "positional_embedding"} <= state.keys()
    if not plain or getattr(trunk, "reg_token", None) is not None:
        raise _Unfit(f"{type(trunk).__name__} is not a plain ViT")
    if "norm_pre.weight" in state:
        raise _Unfit("it has a norm before its blocks")
    block = trunk.blocks[0]
    config = {
        "num_attention_heads": block.attn.num_heads,
        "image_size": _square(trunk.patch_embed.img_size),
        "patch_size": _square(trunk.patch_embed.patch_size),
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }
    if "class_embedding" in state:
        return _tower("ViT", config, state, preprocessing)
    return _tower("SiglipVision", {**config, "vision_use_head": False}, state, preprocessing)


def _open_clip_name(name: str) -> str:
    """OpenCLIP's name of a tensor of timm's."""
    outside = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}
    if not name.startswith("blocks."):
        return outside.get(name, name.replace("patch_embed.proj.", "conv1."))
    for ours, theirs in TIMM_PARTS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return _BLOCKS + name.removeprefix("blocks.")


def _tower(
    family: str, sizes: Mapping[str, Any], state: Mapping[str, Tensor], preprocessing: Preprocessing
) -> VisionTower:
    """Of tensors under OpenCLIP's names. What transformers' model has beyond them is behind the blocks; all else has to
    be there."""
    named = _vit_names(state, sizes) if family == "ViT" else _clip_names(state)
    blocks = {name.split(".")[2] for name in state if name.startswith(_BLOCKS)}
    config = getattr(library(), f"{family}Config")(
        hidden_size=state["conv1.weight"].shape[0],
        intermediate_size=state[f"{_BLOCKS}0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=len(blocks),
        **sizes,
    )
    kind = getattr(library(), f"{family}Model")
    model, report = kind.from_pretrained(None, config=config, state_dict=named, output_loading_info=True)
    behind = ("post_layernorm.", "layernorm.", "pooler.")
    lost = [name for name in report["missing_keys"] if not name.removeprefix("vision_model.").startswith(behind)]
    if lost or report["unexpected_keys"]:
        raise _Unfit(f"its weights do not fit {kind.__name__} ({', '.join([*lost, *report['unexpected_keys']][:3])})")
    size, patch = sizes["image_size"], sizes["patch_size"]
    settings = hf.image_settings((size, size), preprocessing)
    return VisionTower(model, settings, size, patch, class_token="class_embedding" in state)


def _vit_names(state: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """A patch embedding without a bias gets one of zero, and so does a class token without a position."""
    weight = state["conv1.weight"]
    positions = state["positional_embedding"].reshape(-1, len(weight))
    if len(positions) == (sizes["image_size"] // sizes["patch_size"]) ** 2:
        positions = nn.functional.pad(positions, (0, 0, 1, 0))
    return {
        "embeddings.cls_token": state["class_embedding"].reshape(1, 1, -1),
        "embeddings.position_embeddings": positions[None],
        "embeddings.patch_embeddings.projection.weight": weight,
        "embeddings.patch_embeddings.projection.bias": state.get("conv1.bias", torch.zeros(len(weight))),
        **_blocks(state, "encoder.layer.", hf.PARTS),
    }


def _clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of CLIP's and SigLIP's; the second has no class token, and no norm before its blocks."""
    root, width = "vision_model.", len(state["conv1.weight"])
    outside = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "conv1.bias": "embeddings.patch_embedding.bias",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
    }
    return {
        **{f"{root}{theirs}": state[ours] for ours, theirs in outside.items() if ours in state},
        f"{root}embeddings.position_embedding.weight": state["positional_embedding"].reshape(-1, width),
        **_blocks(state, f"{root}encoder.layers.", _CLIP_PARTS),
    }


def _blocks(state: Mapping[str, Tensor], root: str, parts: Parts) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if name.startswith(_BLOCKS):
            index, _, rest = name.removeprefix(_BLOCKS).partition(".")
            ours = next((one for one in parts if rest.startswith(one)), None)
            if ours is None:
                raise _Unfit(f"its blocks have {rest}")
            theirs = parts[ours]
            names = (theirs,) if isinstance(theirs, str) else theirs
            for module, piece in zip(names, value.chunk(len(names)), strict=True):
                out[f"{root}{index}.{module}.{rest.removeprefix(ours)[1:]}"] = piece.clone()
    return out


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
        model.config.image_size, model.config.patch_size = size, patch  # which may have been lists of two
    except Exception as error:  # OSError, ValueError, safetensors' own, AttributeError of a model that is no ViT
        raise UserError(f"{folder}: no vision model that transformers opens ({first_line(error)})") from error
    names = " ".join(name for name, _ in model.named_parameters())
    if "register" in names:
        raise UserError(f"{folder}: LLaVA drops one class token, and {type(model).__name__} has register tokens too")
    wanted = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_resize")
    written = read_json(folder / "preprocessor_config.json", dict, "settings of an image processor")
    settings = {name: value for name, value in written.items() if name in wanted}
    settings.setdefault("crop_size", {"height": size, "width": size})
    settings.setdefault("do_center_crop", "shortest_edge" in settings.get("size", {}))
    return VisionTower(model, settings, size, patch, "cls_token" in names or "class_embedding" in names)

"""Any vision encoder as a vision model of transformers, which LLaVA's classes take as they are.

Ours become a ViTModel; OpenCLIP's own towers (CLIP, CoCa) a CLIPVisionModel or, without a norm before their blocks
(`clip-of-NAME`), a ViTModel; timm's (SigLIP, ViT) a SiglipVisionModel or, with a class token, a ViTModel. What comes
after the blocks (pooling, projection) is left out, as LLaVA reads none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from open_clip_ov2 import training
from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import read_json
from open_clip_ov2.formats import hf
from open_clip_ov2.formats.encoder import Encoder, Preprocessing
from open_clip_ov2.formats.llava import VisionTower, library, vision_tower
from open_clip_ov2.formats.names import BLOCK, Names, Unfit, in_a_batch, renamed
from open_clip_ov2.formats.timm import NAMES as TIMM_NAMES

_ATTENTION = "encoder.layers.*.self_attn"
# CLIP's and SigLIP's in transformers. The second has no class token, and no norm before its blocks.
_CLIP_NAMES: Names = {
    "class_embedding": ("embeddings.class_embedding",),
    "positional_embedding": ("embeddings.position_embedding.weight",),
    "conv1.": ("embeddings.patch_embedding.",),
    "ln_pre.": ("pre_layrnorm.",),
    f"{BLOCK}attn.in_proj_": (f"{_ATTENTION}.q_proj.", f"{_ATTENTION}.k_proj.", f"{_ATTENTION}.v_proj."),
    f"{BLOCK}attn.out_proj.": (f"{_ATTENTION}.out_proj.",),
    f"{BLOCK}mlp.c_fc.": ("encoder.layers.*.mlp.fc1.",),
    f"{BLOCK}mlp.c_proj.": ("encoder.layers.*.mlp.fc2.",),
    f"{BLOCK}ln_1.": ("encoder.layers.*.layer_norm1.",),
    f"{BLOCK}ln_2.": ("encoder.layers.*.layer_norm2.",),
}
TIMM = "timm:"


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
    except Unfit as error:
        raise UserError(
            f"{source}: {error}, which no vision model of transformers has; name another encoder"
        ) from error


def of_open_clip(visual: Any, preprocessing: Preprocessing) -> VisionTower:
    """OpenCLIP's VisionTransformer as a CLIPVisionModel or, without a norm before its blocks, a ViTModel."""
    state = {name: value.detach().float() for name, value in visual.state_dict().items()}
    if "transformer.resblocks.0.attn.in_proj_weight" not in state:
        raise Unfit(f"{type(visual).__name__} is not a plain ViT")
    block = visual.transformer.resblocks[0]
    config = {
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": _square(visual.image_size),
        "patch_size": _square(visual.patch_size),
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }
    return _tower("CLIPVision" if "ln_pre.weight" in state else "ViT", config, state, preprocessing)


def of_timm(trunk: Any, preprocessing: Preprocessing) -> VisionTower:
    """timm's VisionTransformer as a SiglipVisionModel or, with a class token, as a ViTModel."""
    theirs = {name: value.detach().float() for name, value in trunk.state_dict().items()}
    plain = {"blocks.0.attn.qkv.weight", "pos_embed"} <= theirs.keys()
    if not plain or getattr(trunk, "reg_token", None) is not None:
        raise Unfit(f"{type(trunk).__name__} is not a plain ViT")
    if "norm_pre.weight" in theirs:
        raise Unfit("it has a norm before its blocks")
    names = {timms: (ours,) for ours, (timms,) in TIMM_NAMES.items()}
    state, block = renamed(theirs, names), trunk.blocks[0]
    state["positional_embedding"] = state["positional_embedding"].flatten(0, 1)  # which timm has in a batch of one
    config = {
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": _square(trunk.patch_embed.img_size),
        "patch_size": _square(trunk.patch_embed.patch_size),
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps,
    }
    if "class_embedding" in state:
        return _tower("ViT", config, state, preprocessing)
    return _tower("SiglipVision", {**config, "vision_use_head": False}, state, preprocessing)


def _tower(
    family: str, sizes: Mapping[str, Any], state: Mapping[str, Tensor], preprocessing: Preprocessing
) -> VisionTower:
    """Of tensors under OpenCLIP's names. What transformers' model has beyond them is behind the blocks; all else has to
    be there."""
    size, patch = sizes["image_size"], sizes["patch_size"]
    if family == "ViT":
        positions = state["positional_embedding"]
        if len(positions) == (size // patch) ** 2:  # the class token has none
            positions = nn.functional.pad(positions, (0, 0, 1, 0))
        named = renamed(in_a_batch({**state, "positional_embedding": positions}), hf.NAMES)
    else:
        named = {f"vision_model.{name}": value for name, value in renamed(state, _CLIP_NAMES).items()}
    config = getattr(library(), f"{family}Config")(
        hidden_size=state["conv1.weight"].shape[0],
        intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        **sizes,
    )
    kind = getattr(library(), f"{family}Model")
    model, report = kind.from_pretrained(None, config=config, state_dict=named, output_loading_info=True)
    behind = ("post_layernorm.", "layernorm.", "pooler.")
    lost = [name for name in report["missing_keys"] if not name.removeprefix("vision_model.").startswith(behind)]
    if lost or report["unexpected_keys"]:
        raise Unfit(f"its weights do not fit {kind.__name__} ({', '.join([*lost, *report['unexpected_keys']][:3])})")
    settings = hf.image_settings((size, size), preprocessing)
    return VisionTower(model, settings, size, patch, class_token="class_embedding" in state)


def _square(sides: Any) -> int:
    height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
    if height != width:
        raise Unfit(f"its images or patches are {height} x {width}")
    return int(height)


def _activation(module: nn.Module) -> str:
    """transformers' name."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    names = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    if type(module).__name__ not in names:
        raise Unfit(f"its activation is {type(module).__name__}")
    return names[type(module).__name__]


def _named_timm(name: str, image_size: int | None) -> VisionTower:
    import timm
    from timm.data.config import resolve_model_data_config

    try:
        sizes: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        model = timm.create_model(name, pretrained=True, **sizes)
    except Exception as error:  # an unknown name, no network, a model without a size
        raise UserError(f"{TIMM}{name}: cannot be loaded ({first_line(error)})") from error
    cfg = {**resolve_model_data_config(model), "resize_mode": "shortest"}
    return of_timm(model, Preprocessing.of(cfg))


def _of_transformers(folder: Path) -> VisionTower:
    """The vision model in a folder of transformers' format, alone or as a part (CLIP, SigLIP)."""
    transformers, options = library(), {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        config = getattr(config, "vision_config", config)
        model = transformers.AutoModel.from_pretrained(folder, config=config, dtype="float32", **options)
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

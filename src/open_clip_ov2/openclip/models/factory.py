"""From a model config to a CaptionModel or a bare VisionModel, inside OpenCLIP's own factory functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import factory as open_clip_factory
from open_clip import model as open_clip_model
from torch import nn

from open_clip_ov2.core import CaptionModel, DecoderConfig, KeepRatio, TextConfig, VisionModel
from open_clip_ov2.core.vit_fast import use_fast_parts
from open_clip_ov2.errors import unknown_key
from open_clip_ov2.evaluate.eval_model import Ability
from open_clip_ov2.formats.encoder import PUBLISHED_SIZES, mlp_ratio
from open_clip_ov2.openclip.models.related import ContrastiveCaptionModel, OneTransformerModel

MODEL_CONFIGS = Path(__file__).parents[2] / "model_configs"
DECODER_KEY = "decoder_cfg"  # a config with this key is an ov2 model; null asks for its encoder alone
CONTRASTIVE_KEY = "contrastive_cfg"  # width, layers and heads of a text encoder: OpenVision 1's pair of losses
ONE_TRANSFORMER_KEY = "one_transformer"  # true: GenLIP's, whose decoder is its encoder
OV2_ABILITIES: dict[type, tuple[Ability, ...]] = {
    CaptionModel: ("features", "caption", "dropping"),
    ContrastiveCaptionModel: ("features", "caption", "contrast", "dropping"),
    OneTransformerModel: ("features", "caption"),
}
_DECODER_OPTIONS = {"fusion", "keep_ratio", "eval_keep_ratio"}
_TOP_KEYS = {"embed_dim", "vision_cfg", "text_cfg", DECODER_KEY, "cast_dtype"}
_TOKENIZER_KEYS = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
# With these, OpenCLIP's VisionTransformer is the reference's (docs/reference.md, "Released encoder checkpoints").
VISION_FIXED = {
    "no_ln_pre": True,
    "pool_type": "avg",
    "final_ln_after_pool": True,
    "output_tokens": True,
    "norm_kwargs": {"eps": 1e-6},
}
_VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}


def is_ov2_config(config: Mapping[str, Any] | None) -> bool:
    return config is not None and DECODER_KEY in config


def config_named(model_name: str) -> dict[str, Any]:
    """The config of a name of OpenCLIP's registry, a folder or the hub; empty if there is none."""
    return open_clip_factory.get_model_config(model_name) or {}


def is_ov2_model(model_name: str) -> bool:
    return is_ov2_config(config_named(model_name))


def is_contrastive(model_name: str) -> bool:
    """Whether it is an ov2 model with a contrastive loss beside its caption loss."""
    return bool(config_named(model_name).get(CONTRASTIVE_KEY))


def is_vision_only(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for a bare encoder: `decoder_cfg` is null, or the layout is the authors' release."""
    if DECODER_KEY in config:
        return config[DECODER_KEY] is None
    vision = config.get("vision_cfg")
    return (
        isinstance(vision, Mapping)
        and vision.get("output_tokens") is True
        and "multimodal_cfg" not in config
        and not vision.get("timm_model_name")
        and not vision.get("attentional_pool")
        and vision.get("pool_type") == "avg"  # OpenCLIP's default differs
        and all(vision.get(key, value) == value for key, value in VISION_FIXED.items())
    )


def build_caption_model(**config: Any) -> CaptionModel:
    """A CaptionModel from the keys of a model config. Raises ValueError for unknown keys and values out of range."""
    check_keys("model config", config, _TOP_KEYS | _DECODER_OPTIONS | {CONTRASTIVE_KEY, ONE_TRANSFORMER_KEY})
    if config["embed_dim"] != config["vision_cfg"]["width"]:
        raise ValueError(f"an ov2 model has embed_dim = vision_cfg.width, got {config['embed_dim']}")
    check_image_size(config["vision_cfg"]["image_size"], config["vision_cfg"]["patch_size"])
    visual = _vision_tower(config, config["vision_cfg"])
    init_vision(visual)
    decoder_cfg = {**config[DECODER_KEY], **({"fusion": config["fusion"]} if "fusion" in config else {})}
    check_keys("decoder_cfg", decoder_cfg, DecoderConfig.__dataclass_fields__)
    check_keys("text_cfg", config["text_cfg"], {*TextConfig.__dataclass_fields__, *_TOKENIZER_KEYS})
    text_cfg = {key: value for key, value in config["text_cfg"].items() if key not in _TOKENIZER_KEYS}
    kind, ratio = caption_model_class(config), KeepRatio.of(config.get("keep_ratio", 0.35))
    more: dict[str, Any] = {"text_tower": _text_tower(config)} if kind is ContrastiveCaptionModel else {}
    decoder, text = DecoderConfig(**decoder_cfg), TextConfig(**text_cfg)
    return kind(visual, decoder, text, keep_ratio=ratio, eval_keep_ratio=config.get("eval_keep_ratio"), **more)


def caption_model_class(config: Mapping[str, Any]) -> type[CaptionModel]:
    """What `build_caption_model` makes of a config."""
    if config.get(ONE_TRANSFORMER_KEY):
        return OneTransformerModel
    return ContrastiveCaptionModel if config.get(CONTRASTIVE_KEY) else CaptionModel


def _text_tower(config: Mapping[str, Any]) -> nn.Module:
    """OpenCLIP's text encoder, pooled at the end of text, with an output as wide as the image's. Raises ValueError."""
    sizes, text = config[CONTRASTIVE_KEY], config["text_cfg"]
    check_keys(CONTRASTIVE_KEY, sizes, {"width", "layers", "heads"})
    words = {key: text[key] for key in ("context_length", "vocab_size", "eos_id")}
    return open_clip_model._build_text_tower(config["embed_dim"], {**words, **sizes, "pool_type": "eos"})


def build_vision_model(**config: Any) -> VisionModel:
    """A bare encoder. Raises ValueError for unknown keys and values out of range."""
    options = _DECODER_OPTIONS if DECODER_KEY in config else set()  # options of the decoder have no effect here
    check_keys("model config", config, _TOP_KEYS | {"position_table"} | options)
    visual = _vision_tower(config, complete_vision_cfg(config["vision_cfg"]))
    table = config.get("position_table")
    model: Any = VisionModel(visual) if table is None else VisionModel(visual, position_table=table)
    model.alone_by_layout = DECODER_KEY not in config  # a file may then hold a text tower, which weights.py refuses
    model.reset_position_table()
    return model


def complete_vision_cfg(given: Mapping[str, Any]) -> dict[str, Any]:
    """With the published sizes where a released config leaves them out. Raises ValueError."""
    check_keys("vision_cfg", given, _VISION_KEYS | set(VISION_FIXED))
    vision_cfg = {**given}
    if (width := vision_cfg.get("width")) in PUBLISHED_SIZES:
        heads, mlp_width = PUBLISHED_SIZES[width]
        vision_cfg.setdefault("head_width", width // heads)
        vision_cfg.setdefault("mlp_ratio", mlp_ratio(width, mlp_width))
    for key in ("width", "layers", "patch_size", "image_size"):
        if key not in vision_cfg:
            raise ValueError(f"vision_cfg has no {key}")
    return vision_cfg


def _vision_tower(config: Mapping[str, Any], vision_cfg: Mapping[str, Any]) -> nn.Module:
    """OpenCLIP's encoder with the settings that an ov2 model has. Raises ValueError for other settings."""
    for key, value in VISION_FIXED.items():
        if vision_cfg.get(key, value) != value:
            raise ValueError(f"an ov2 model has vision_cfg.{key} = {value!r}, not {vision_cfg[key]!r}")
    vision_cfg = {**vision_cfg, **VISION_FIXED}
    visual = open_clip_model._build_vision_tower(config["embed_dim"], vision_cfg, cast_dtype=config.get("cast_dtype"))
    use_fast_parts(visual)
    return visual


def check_image_size(image_size: int | Sequence[int], patch_size: int) -> None:
    """Raises ValueError for sides in px that patches do not fill: what is left over would never be seen."""
    for side in (image_size,) if isinstance(image_size, int) else image_size:
        if left := side % patch_size:
            sizes = [size for size in (side - left, side - left + patch_size) if size]
            raise ValueError(
                f"image size {side} is not a multiple of the patch size {patch_size}, so {left} px at the edge would "
                f"never be seen; the nearest are {' and '.join(map(str, sizes))}"
            )


def check_named_size(model_name: str, image_size: int | Sequence[int] | None) -> None:
    """`check_image_size` for a ViT of OpenCLIP's registry or a folder, unless the size is the model's own. Raises
    ValueError."""
    vision = config_named(model_name).get("vision_cfg", {})
    patch_size = vision.get("patch_size")
    if image_size is not None and isinstance(patch_size, int) and image_size != vision.get("image_size"):
        check_image_size(image_size, patch_size)


def check_keys(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError, as OpenCLIP's factory does, for a key that is not known."""
    for key in given:
        if key not in known:
            raise ValueError(str(unknown_key(where, key, sorted(known))))


@torch.no_grad()
def init_vision(visual: nn.Module) -> None:
    """big_vision's initialization of a ViT (OpenCLIP leaves torch's defaults).

    Xavier-uniform attention (q, k and v separately) and MLP kernels, MLP biases normal(1e-6), patch embedding
    LeCun-normal. The class token is normal(0.02), not zero: with a zero position row LayerNorm would see a zero vector
    and multiply its gradient by eps^-0.5 = 1000. The untrained head is the identity.
    """
    vit: Any = visual
    fan_in = vit.conv1.weight[0].numel()
    nn.init.trunc_normal_(vit.conv1.weight, std=fan_in**-0.5 / 0.87962566103423978, a=-2.0, b=2.0)
    nn.init.normal_(vit.class_embedding, std=0.02)
    for block in vit.transformer.resblocks:
        for part in block.attn.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(block.attn.in_proj_bias)
        nn.init.xavier_uniform_(block.attn.out_proj.weight)
        nn.init.zeros_(block.attn.out_proj.bias)
        for linear in (block.mlp.c_fc, block.mlp.c_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
    nn.init.eye_(vit.proj)


def dispatch_model_class(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """create_model takes the class from its module's globals: a config with decoder_cfg becomes a CaptionModel, and a
    released vision-only config a VisionModel, for which OpenCLIP builds a text tower that has no weights."""

    def model_class(*args: Any, **kwargs: Any) -> nn.Module:
        if not args and is_vision_only(kwargs):
            return build_vision_model(**kwargs)
        if DECODER_KEY in kwargs:
            return build_caption_model(**kwargs)
        return original(*args, **kwargs)

    model_class.__name__ = original.__name__  # OpenCLIP logs it
    return model_class

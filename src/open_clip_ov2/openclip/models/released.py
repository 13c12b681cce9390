"""The released checkpoints in OpenCLIP's own factory: vision-only encoders, and the caption decoders beside them.

Source: docs/reference.md, "Released encoder checkpoints". A vision-only config has an encoder like the family's with
`output_tokens` and a text_cfg that no weights belong to; stock OpenCLIP builds a text tower for it and cannot load the
file. OpenVision 1 checkpoints are CLIPs and stay OpenCLIP's own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from open_clip import factory as open_clip_factory
from open_clip import model as open_clip_model
from torch import nn

from open_clip_ov2.core import CaptionModel, DecoderConfig, KeepRatio, TextConfig, VisionModel, sincos_2d
from open_clip_ov2.core.vit_fast import use_fast_parts
from open_clip_ov2.formats.encoder import mlp_ratio
from open_clip_ov2.openclip.models.factory import DECODER_KEY, VISION_FIXED, build_caption_model, check_keys
from open_clip_ov2.openclip.models.weights import TABLE_TOLERANCE, check_fit, load_encoder_file, read_tensors

logger = logging.getLogger(__name__)

DECODER_FILE, DECODER_CONFIG, VOCAB_FILE = (
    "caption_decoder.safetensors", "text_decoder_config.json", "bert_base_vocab_bos_eos.txt",
)  # fmt: skip
VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"} | set(
    VISION_FIXED
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # NAME or ORGANISATION/NAME
_TOP_KEYS = {"embed_dim", "vision_cfg", "text_cfg", DECODER_KEY, "cast_dtype", "output_dict", "position_table"}
_DECODER_KEYS = {
    "architecture", "fusion_style", "width", "depth", "num_heads", "mlp_dim", "vocab_size", "vision_width", "pad_id",
    "bos_id", "eos_id", "tokenizer",
}  # fmt: skip
# docs/reference.md, encoder variants: (heads, mlp width) by width, for configs that leave them out.
PUBLISHED_SIZES = {
    192: (3, 768), 384: (6, 1536), 768: (12, 3072), 1024: (16, 4096), 1152: (16, 4304), 1280: (16, 5120),
    1408: (16, 6144),
}  # fmt: skip
FUSION_STYLES = {"concat": "prefix", "cross_attn": "cross_attn"}  # the released decoders' concat is a prefix LM
# Their length in training, and all tokens at inference, as the release's own captioning script has it.
CONTEXT_LENGTH, EVAL_KEEP_RATIO = 128, 1.0


def is_vision_only(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for a bare encoder: `decoder_cfg` none, or the released layout."""
    if DECODER_KEY in config:
        return config[DECODER_KEY] is None
    vision = config.get("vision_cfg")
    return (
        isinstance(vision, Mapping)
        and vision.get("output_tokens") is True
        and "multimodal_cfg" not in config
        and not vision.get("timm_model_name")
        and not vision.get("attentional_pool")
        and vision.get("pool_type") == "avg"  # stock's default is another
        and all(vision.get(key, value) == value for key, value in VISION_FIXED.items())
    )


def build_vision_model(**config: Any) -> VisionModel:
    """Raises ValueError for unknown keys and values out of range."""
    for key in ("fusion", "keep_ratio", "eval_keep_ratio"):
        config.pop(key, None) if DECODER_KEY in config else None  # of the decoder that is not wanted
    check_keys("model config", config, _TOP_KEYS)
    vision_cfg = complete_vision_cfg(config["vision_cfg"])
    visual = open_clip_model._build_vision_tower(config["embed_dim"], vision_cfg, cast_dtype=config.get("cast_dtype"))
    use_fast_parts(visual)
    options = {key: config[key] for key in ("position_table", "output_dict") if config.get(key) is not None}
    model: Any = VisionModel(visual, **options)
    model.alone_by_layout = DECODER_KEY not in config  # nobody said so: weights.py then looks for a text tower
    model.reset_position_table()
    return model


def complete_vision_cfg(given: Mapping[str, Any]) -> dict[str, Any]:
    """With what the family fixes, and with the published sizes where the config is silent. Raises ValueError."""
    check_keys("vision_cfg", given, VISION_KEYS)
    vision_cfg = {**VISION_FIXED, **given}
    if vision_cfg.get("width") in PUBLISHED_SIZES:
        width = vision_cfg["width"]
        heads, mlp_width = PUBLISHED_SIZES[width]
        vision_cfg.setdefault("head_width", width // heads)
        vision_cfg.setdefault("mlp_ratio", mlp_ratio(width, mlp_width))
    for key in ("width", "layers", "patch_size", "image_size"):
        if key not in vision_cfg:
            raise ValueError(f"vision_cfg has no {key}")
    return vision_cfg


def add_decoder(vision: VisionModel, folder: Path) -> CaptionModel:
    """The encoder with the caption decoder of a released folder. Raises ValueError."""
    file = folder / DECODER_CONFIG
    config = _read_json(file)
    check_keys(str(file), config, _DECODER_KEYS)
    missing = sorted(_DECODER_KEYS - {"architecture", "tokenizer", "pad_id"} - config.keys())
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    if config["fusion_style"] not in FUSION_STYLES:
        raise ValueError(f"{file}: unknown fusion_style {config['fusion_style']!r} (known: {', '.join(FUSION_STYLES)})")
    visual = vision.visual
    stored, width = visual.positional_embedding.detach().float(), visual.positional_embedding.shape[1]
    if config["vision_width"] != width:
        raise ValueError(f"{file}: vision_width {config['vision_width']}, and the encoder's width is {width}")
    if (stored - sincos_2d(visual.grid_size, width)).abs().max() > TABLE_TOLERANCE:
        raise ValueError(
            f"{folder}: the encoder's position table is not the family's fixed one at {visual.image_size}; give its "
            "own resolution, or position_table='recompute'"
        )
    decoder = DecoderConfig(
        config["width"], config["depth"], config["num_heads"], config["mlp_dim"],
        FUSION_STYLES[config["fusion_style"]],  # type: ignore[arg-type]
    )  # fmt: skip
    text = TextConfig(CONTEXT_LENGTH, config["vocab_size"], config["bos_id"], config["eos_id"], config.get("pad_id", 0))
    model = CaptionModel(visual, decoder, text, keep_ratio=KeepRatio.of(0.35), eval_keep_ratio=EVAL_KEEP_RATIO)
    weights = read_tensors(folder / DECODER_FILE)
    check_fit(str(folder / DECODER_FILE), weights, model.text_decoder.state_dict())
    model.text_decoder.load_state_dict(weights)
    return model


def check_config(config: Any, where: str) -> None:
    """A config from a folder or the hub: whole, and without a way to make code run. Raises ValueError."""
    model_cfg = config.get("model_cfg", config) if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{where}: no model config (a JSON object with model_cfg)")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if missing:
        raise ValueError(f"{where}: model_cfg has no {' and no '.join(missing)}")
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg[key], dict):
            raise ValueError(f"{where}: model_cfg.{key} is not a JSON object")
    refuse_remote_code(model_cfg, where)


def refuse_remote_code(model_cfg: Mapping[str, Any], where: str) -> None:
    """`tokenizer_kwargs` reach AutoTokenizer.from_pretrained as they are. Raises ValueError."""
    text_cfg = model_cfg.get("text_cfg")
    kwargs = text_cfg.get("tokenizer_kwargs") if isinstance(text_cfg, Mapping) else None
    if isinstance(kwargs, Mapping) and kwargs.get("trust_remote_code"):
        raise ValueError(f"{where}: text_cfg.tokenizer_kwargs asks for trust_remote_code, which a config may not")


def check_tokenizer_folder(folder: Path) -> None:
    """What `get_tokenizer("local-dir:FOLDER")` is about to follow. Raises ValueError."""
    file = folder / "open_clip_config.json"
    if file.is_file():
        config = _read_json(file)
        refuse_remote_code(config.get("model_cfg", config), str(file))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def dispatch_model_class(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """In the place of CLIP and of CustomTextCLIP."""

    def model_class(*args: Any, **kwargs: Any) -> nn.Module:
        if not args and is_vision_only(kwargs):
            return build_vision_model(**kwargs)
        if DECODER_KEY in kwargs:
            return build_caption_model(**kwargs)
        return original(*args, **kwargs)

    model_class.__name__ = original.__name__  # OpenCLIP logs it
    return model_class


def load_image_weights_strictly(original: Callable[..., Any]) -> Callable[..., Any]:
    """`pretrained_image_path` for models of ours; any other is upstream's."""

    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        path = kwargs.get("pretrained_image_path")
        config = open_clip_factory.get_model_config(model_name) if path else None
        if config is None or not (DECODER_KEY in config or is_vision_only(config)):
            return original(model_name, *args, **kwargs)
        model = original(model_name, *args, **{**kwargs, "pretrained_image_path": None})
        load_encoder_file(model, str(path))
        return model

    return create_model


def check_local_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """OpenCLIP calls this once it has read a folder's config, and turns a ValueError into its own."""

    def find_checkpoint_in_dir(dir_path: Path) -> Any:
        file = Path(dir_path) / "open_clip_config.json"
        check_config(_read_json(file), str(file))
        return original(dir_path)

    return find_checkpoint_in_dir


def check_hub_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_hf_config(model_id: str, cache_dir: str | None = None) -> Any:
        config = original(model_id, cache_dir=cache_dir)
        check_config(config, f"hf-hub:{model_id}")
        _check_hub_tokenizer(config, model_id)
        return config

    return get_hf_config


def _check_hub_tokenizer(config: Any, model_id: str) -> None:
    """A config from elsewhere may name a hub repository as its tokenizer, never a file of this machine."""
    model_cfg = config.get("model_cfg", config) if isinstance(config, Mapping) else {}
    text_cfg = model_cfg.get("text_cfg") if isinstance(model_cfg, Mapping) else None
    name = text_cfg.get("hf_tokenizer_name") if isinstance(text_cfg, Mapping) else None
    if not name:
        return
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or Path(name).exists():
        raise ValueError(f"hf-hub:{model_id}: its config names {name!r} as tokenizer, which is no name of the hub")

"""Folders of the authors' release, and checks of any folder's or hub repository's config.

Source: docs/reference.md, "Released encoder checkpoints". A vision-only config has an encoder as ov2 models have it,
with `output_tokens` and a text_cfg that no weights belong to; stock OpenCLIP builds a text tower for it and cannot load
the file. A caption decoder lies beside some encoders. OpenVision 1 checkpoints are CLIPs and stay OpenCLIP's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from open_clip_ov2.core import CaptionModel, DecoderConfig, KeepRatio, TextConfig, VisionModel, sincos_2d
from open_clip_ov2.files import read_json
from open_clip_ov2.formats.authors import DECODER_CONFIG, DECODER_FILE
from open_clip_ov2.formats.open_clip import CONFIG
from open_clip_ov2.openclip.models.factory import check_keys
from open_clip_ov2.openclip.models.weights import TABLE_TOLERANCE, check_fit, read_tensors

LINK = ".checkpoint"  # a link to the weights, in a folder that own_config.py makes
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # NAME or ORGANIZATION/NAME
_REQUIRED_KEYS = {
    "fusion_style", "width", "depth", "num_heads", "mlp_dim", "vocab_size", "vision_width", "bos_id", "eos_id",
}  # fmt: skip
_OPTIONAL_KEYS = {"architecture", "tokenizer", "pad_id"}
FUSION_STYLES = {"concat": "prefix", "cross_attn": "cross_attn"}  # the released decoders' concat is a prefix LM
# Their caption length in training, and all image tokens at inference, as in the release's own captioning script.
CONTEXT_LENGTH, EVAL_KEEP_RATIO = 128, 1.0


def add_decoder(vision: VisionModel, folder: Path) -> CaptionModel:
    """The encoder with the caption decoder of a released folder. Raises ValueError, or UserError for a damaged file."""
    file, visual = folder / DECODER_CONFIG, vision.visual
    config = read_json(file, dict, "the decoder's config")
    check_keys(str(file), config, _REQUIRED_KEYS | _OPTIONAL_KEYS)
    if missing := sorted(_REQUIRED_KEYS - config.keys()):
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    fusion = FUSION_STYLES.get(config["fusion_style"])
    if fusion is None:
        raise ValueError(f"{file}: unknown fusion_style {config['fusion_style']!r} (known: {', '.join(FUSION_STYLES)})")
    stored, width = visual.positional_embedding.detach().float(), visual.positional_embedding.shape[1]
    if config["vision_width"] != width:
        raise ValueError(f"{file}: vision_width {config['vision_width']}, and the encoder's width is {width}")
    if (stored - sincos_2d(visual.grid_size, width)).abs().max() > TABLE_TOLERANCE:
        raise ValueError(
            f"{folder}: the encoder's position table is not the fixed one of ov2 models at {visual.image_size}; give "
            "its own resolution, or position_table='recompute'"
        )
    sizes = (config["width"], config["depth"], config["num_heads"], config["mlp_dim"])
    text = TextConfig(CONTEXT_LENGTH, config["vocab_size"], config["bos_id"], config["eos_id"], config.get("pad_id", 0))
    decoder = DecoderConfig(*sizes, fusion)  # type: ignore[arg-type]
    model = CaptionModel(visual, decoder, text, keep_ratio=KeepRatio.of(0.35), eval_keep_ratio=EVAL_KEEP_RATIO)
    weights = read_tensors(folder / DECODER_FILE)
    check_fit(str(folder / DECODER_FILE), weights, model.text_decoder.state_dict())
    model.text_decoder.load_state_dict(weights)
    return model


def check_config(config: Any, where: str) -> None:
    """Check that a config from a folder or the hub is complete, and cannot make code run. Raises ValueError."""
    model_cfg = config.get("model_cfg", config) if isinstance(config, dict) else None
    if not isinstance(model_cfg, dict):
        raise ValueError(f"{where}: no model config (a JSON object with model_cfg)")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if missing:
        raise ValueError(f"{where}: model_cfg has no {' and no '.join(missing)}")
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg[key], dict):
            raise ValueError(f"{where}: model_cfg.{key} is not a JSON object")
    refuse_remote_code(model_cfg["text_cfg"], where)


def refuse_remote_code(text_cfg: Mapping[str, Any], where: str) -> None:
    """`tokenizer_kwargs` reach AutoTokenizer.from_pretrained unchanged. Raises ValueError."""
    kwargs = text_cfg.get("tokenizer_kwargs")
    if isinstance(kwargs, Mapping) and kwargs.get("trust_remote_code"):
        raise ValueError(
            f"{where}: text_cfg.tokenizer_kwargs asks for trust_remote_code, which is not allowed in a config"
        )


def check_tokenizer_folder(folder: Path) -> None:
    """Check what `get_tokenizer("local-dir:FOLDER")` is about to follow. Raises ValueError."""
    if (folder / CONFIG).is_file():
        model_cfg = read_json(folder / CONFIG, dict).get("model_cfg", {})
        refuse_remote_code(model_cfg.get("text_cfg", {}), str(folder / CONFIG))


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def check_local_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """A folder's config without vision_cfg is an error that says so; OpenCLIP, which calls this after it has read it
    and turns a ValueError into its own, raises a bare KeyError."""

    def find_checkpoint_in_dir(dir_path: Path) -> Any:
        file, link = Path(dir_path) / CONFIG, Path(dir_path) / LINK
        check_config(read_json(file), str(file))
        return str(link.readlink()) if link.is_symlink() else original(dir_path)

    return find_checkpoint_in_dir


def check_hub_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the hub; its config may not switch on trust_remote_code for its tokenizer, which may be another hub
    repository's, never a file of this machine."""

    def get_hf_config(model_id: str, cache_dir: str | None = None) -> Any:
        config, where = original(model_id, cache_dir=cache_dir), f"hf-hub:{model_id}"
        check_config(config, where)
        name = config.get("model_cfg", config)["text_cfg"].get("hf_tokenizer_name")
        if name and (not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or Path(name).exists()):
            raise ValueError(f"{where}: its config names {name!r} as tokenizer, which is not the name of a repository")
        return config

    return get_hf_config

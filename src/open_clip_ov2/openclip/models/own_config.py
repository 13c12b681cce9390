"""The configuration that a checkpoint carries or has beside it; named_model.py uses it where the checkpoint is opened.

Checkpoints of `ov2 train` carry their model, preprocessing and vocabulary (CONFIG_KEY); for other files
open_clip_config.json and vocab.txt beside them or one folder up count, as in a run's folder.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import factory as open_clip_factory
from open_clip.transform import PreprocessCfg

from open_clip_ov2.core import CaptionModel, KeepRatio
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, write_json, write_text
from open_clip_ov2.formats.open_clip import CONFIG
from open_clip_ov2.openclip.models.factory import DECODER_KEY, is_ov2_config, is_vision_only
from open_clip_ov2.openclip.models.preprocess import ov2_preprocess_cfg
from open_clip_ov2.openclip.models.released import LINK, check_config
from open_clip_ov2.openclip.models.tokenizer import MODE, VOCAB
from open_clip_ov2.train.checkpoint import CONFIG_KEY, list_checkpoints

LOCAL, MAX_TOKENS = "local-dir:", "max_tokens"


@dataclass(frozen=True)
class OwnConfig:
    """`model_cfg` and `preprocess_cfg` as in open_clip_config.json; `vocabulary`: the text of vocab.txt, for word
    pieces; `folder`: what else the tokenizer needs."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    vocabulary: str | None = None
    folder: Path | None = None

    def carried(self) -> dict[str, Any]:
        """What a checkpoint has under CONFIG_KEY."""
        return {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg, "vocabulary": self.vocabulary}

    def write(self, folder: Path, *, sync: bool = True) -> None:
        """open_clip_config.json, and vocab.txt for word pieces, in the place of links too."""
        write_json(folder / CONFIG, {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}, sync=sync)
        if self.vocabulary is not None:
            write_text(folder / VOCAB, self.vocabulary, sync=sync)

    @property
    def has_decoder(self) -> bool:
        return bool(self.model_cfg.get(DECODER_KEY))

    def settings(self) -> dict[str, Any]:
        """What makes pixels and tokens, and the sizes that a run may change, by the names that messages use."""
        text = self.model_cfg["text_cfg"]
        named = text.get("hf_tokenizer_name", "OpenCLIP's")
        found = {
            "image size": _sides(self.model_cfg["vision_cfg"].get("image_size", 224)),
            "context length": text.get("context_length", 77),
            "vocabulary size": text.get("vocab_size", 49408),
            "tokenizer": "word pieces" if text.get("tokenizer_mode") == MODE else named,
        }
        if self.has_decoder:
            keep = KeepRatio.of(self.model_cfg.get("keep_ratio", 0.35))
            evaluated = self.model_cfg.get("eval_keep_ratio")
            found |= {
                "fusion": self.model_cfg.get("fusion", "prefix"),
                "keep ratio": str(keep),
                "evaluation keep ratio": keep.high if evaluated is None else evaluated,
            }
        if self.is_ours:
            given = {key: one for key, one in self.preprocess_cfg.items() if key != MAX_TOKENS}
            return found | _pixels(ov2_preprocess_cfg(given))
        return found | _pixels({**asdict(PreprocessCfg()), **self.preprocess_cfg})

    @property
    def max_tokens(self) -> int | None:
        """Of one image, if the model was trained with --aspect native. Stock OpenCLIP ignores this key."""
        return self.preprocess_cfg.get(MAX_TOKENS)

    @property
    def is_ours(self) -> bool:
        return is_ov2_config(self.model_cfg) or is_vision_only(self.model_cfg)


def _pixels(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mean": tuple(preprocess["mean"]),
        "std": tuple(preprocess["std"]),
        "interpolation": str(preprocess["interpolation"]),
        "resize mode": preprocess["resize_mode"],
    }


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def settings_of(model: Any) -> dict[str, Any]:
    """Of a model that exists: `OwnConfig.settings` as far as a model knows them."""
    found = {"image size": _sides(model.visual.image_size), **_pixels(model.visual.preprocess_cfg)}
    if isinstance(model, CaptionModel):
        found |= {
            "context length": model.context_length,
            "vocabulary size": model.vocab_size,
            "fusion": model.text_decoder.config.fusion,
            "keep ratio": str(model.token_drop.keep_ratio),
            "evaluation keep ratio": model.token_drop.eval_keep_ratio,
        }
    return found


# --- where it is -----------------------------------------------------------------------------------------


def config_of(checkpoint: Path) -> OwnConfig | None:
    """What a checkpoint says of itself, or the folder beside or above it says; None if neither does. Raises UserError
    for a config that is damaged or incomplete."""
    folder = next((one for one in (checkpoint.parent, checkpoint.parent.parent) if (one / CONFIG).is_file()), None)
    carried = _carried(checkpoint)
    if carried is None:
        return None if folder is None else config_in(folder)
    return _checked(OwnConfig(**carried, folder=folder), carried, str(checkpoint))


def config_in(folder: Path) -> OwnConfig:
    """Of a model folder. Raises UserError for a config that is damaged or incomplete."""
    config, vocabulary = read_json(folder / CONFIG, dict), folder / VOCAB
    words = vocabulary.read_text(encoding="utf-8") if vocabulary.is_file() else None
    own = OwnConfig(config.get("model_cfg", config), config.get("preprocess_cfg", {}), words, folder)
    return _checked(own, config, str(folder / CONFIG))


def _checked(own: OwnConfig, config: dict[str, Any], where: str) -> OwnConfig:
    try:
        check_config(config, where)
    except ValueError as error:
        raise UserError(str(error)) from error
    return own


def is_of_ov2_train(checkpoint: Path) -> bool:
    """Whether `ov2 train` wrote it, of whatever model; all other files of CLIP and CoCa are OpenCLIP's own."""
    return (checkpoint.parent.parent / "run.json").is_file() or _carried(checkpoint) is not None


def named_config(name: str) -> OwnConfig | None:
    """The configuration that a name has in OpenCLIP's registry, in its folder, or on the hub."""
    schema, where = open_clip_factory.parse_model_name(name)
    if schema == "local-dir":
        return config_in(Path(where)) if (Path(where) / CONFIG).is_file() else None
    config = open_clip_factory.get_model_config(name)
    return None if config is None else OwnConfig(config, {})


def _carried(checkpoint: Path) -> dict[str, Any] | None:
    """Read without the tensors. None also for a file that is no checkpoint: whoever loads it says so."""
    if not zipfile.is_zipfile(checkpoint):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which then is an error
            content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch, zipfile and pickle each have their own
        return None
    return content.get(CONFIG_KEY) if isinstance(content, dict) else None


@contextlib.contextmanager
def as_folder(checkpoint: Path, config: OwnConfig) -> Iterator[str]:
    """The `local-dir:` name of a temporary folder that OpenCLIP opens: a checkpoint with its configuration."""
    with tempfile.TemporaryDirectory(prefix="ov2-") as temporary:
        folder = Path(temporary)
        for file in config.folder.iterdir() if config.folder else ():
            if file.is_file() and file.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
                (folder / file.name).symlink_to(file.absolute())
        config.write(folder, sync=False)
        (folder / LINK).symlink_to(checkpoint.absolute())
        yield f"{LOCAL}{folder}"


def newest_of_run(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder; None for any other folder. Raises UserError if there is none yet."""
    if not (folder / "checkpoints").is_dir():
        return None
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        raise UserError(
            f"{folder}: no checkpoint in {folder / 'checkpoints'} yet, so it has no weights (in Python, "
            "load_weights=False makes its model with new ones)"
        )
    if found[-1].is_dir():
        raise UserError(f"{found[-1]}: a sharded checkpoint; make a file of it: ov2 convert {found[-1]} --to FILE.pt")
    return found[-1]


def has_weights(folder: Path) -> bool:
    """Whether there are weights in the folder itself, as OpenCLIP looks for them."""
    return any(any(folder.glob(suffix)) for suffix in ("*.safetensors", "*.bin", "*.pth"))


def brings_weights(name: str) -> bool:
    """Whether `create_model(NAME)` loads weights that belong to the name."""
    schema, where = open_clip_factory.parse_model_name(name)
    if schema != "local-dir":
        return schema == "hf-hub"
    return (Path(where) / "checkpoints").is_dir() or has_weights(Path(where))

"""A run's folder as OpenCLIP's `local-dir:` model: config, preprocessing and tokenizer beside the checkpoints."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory as open_clip_factory
from torch import nn

from open_clip_ov2.errors import UserError
from open_clip_ov2.seam.tokenizer import MODE, find_vocab

CONFIG = "open_clip_config.json"


def resolved_config(args: argparse.Namespace, model_options: dict[str, Any]) -> dict[str, Any]:
    """The model config with every flag that changed it folded in."""
    cfg = deepcopy(open_clip_factory.get_model_config(args.model))
    if cfg is None:
        raise UserError(f"--model {args.model}: no config to be had")
    cfg.update({key: str(value) if key == "keep_ratio" else value for key, value in model_options.items()})
    size = args.force_image_size
    if size is not None:
        cfg["vision_cfg"]["image_size"] = size[0] if isinstance(size, list) and len(size) == 1 else size
    if args.force_context_length is not None:
        cfg["text_cfg"]["context_length"] = args.force_context_length
    return cfg


def write_config(run_dir: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    """RUN/open_clip_config.json, and vocab.txt where the model was trained with word pieces."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text_cfg = model_cfg["text_cfg"]
    if text_cfg.get("tokenizer_mode") == MODE:
        shutil.copyfile(find_vocab(text_cfg["hf_tokenizer_name"]), run_dir / "vocab.txt")
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2)
    (run_dir / CONFIG).write_text(text + "\n")


@dataclass
class LoadedRun:
    """A trained model, ready for use on `device`."""

    model: nn.Module
    preprocess: Any
    tokenizer: Any
    preprocess_cfg: dict[str, Any]
    folder: Path
    checkpoint: Path


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint file) of either. Raises UserError."""
    if path.is_file():
        for folder in (path.parent, path.parent.parent):
            if (folder / CONFIG).is_file():
                return folder, path
        raise UserError(f"{path}: no {CONFIG} beside it or one folder up, so its model is not known")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: not the folder of a run (no {CONFIG} in it)")
    found = list((path / "checkpoints").glob("epoch_*.pt"))
    if not found:
        raise UserError(f"{path}: no checkpoint in {path / 'checkpoints'} yet")
    return path, max(found, key=_epoch_number)


def _epoch_number(file: Path) -> tuple[int, str]:
    number = re.fullmatch(r"epoch_(\d+)", file.stem)
    return (int(number.group(1)) if number else -1, file.name)


def load_run(path: Path, device: str = "cpu") -> LoadedRun:
    """The newest checkpoint of a run's folder, or the checkpoint named. Raises UserError."""
    folder, checkpoint = find_checkpoint(path)
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
    try:
        open_clip_factory.load_checkpoint(model, str(checkpoint), weights_only=True)
    except Exception as error:
        raise UserError(f"{checkpoint}: cannot be loaded ({str(error).splitlines()[0]})") from error
    model.to(torch.device(device)).eval()
    return LoadedRun(
        model,
        preprocess,
        open_clip.get_tokenizer(name),
        dict(model.visual.preprocess_cfg),
        folder,
        checkpoint,
    )

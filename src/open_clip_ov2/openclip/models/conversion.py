"""`ov2 convert`: the authors' checkpoints to a model folder of ours, a model back to their Flax parameters, and a
sharded checkpoint to one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import written_whole
from open_clip_ov2.formats import flax_model_cfg, from_flax, read_flax, to_flax
from open_clip_ov2.formats.flax import NOT_IN_FLAX, write_npz
from open_clip_ov2.formats.model_files import new_folder
from open_clip_ov2.formats.open_clip import CONFIG
from open_clip_ov2.openclip.models.exports import export_source
from open_clip_ov2.openclip.models.factory import build_caption_model
from open_clip_ov2.openclip.models.open_model import LoadedModel, caption_model, open_model
from open_clip_ov2.openclip.models.preprocess import ov2_preprocess_cfg
from open_clip_ov2.openclip.models.tokenizer import BOS_ID, EOS_ID, PAD_ID, WordPieceTokenizer
from open_clip_ov2.openclip.models.weights import check_fit
from open_clip_ov2.train.checkpoint import read_checkpoint
from open_clip_ov2.train.sharded import CONTENT as SHARDED_CONTENT

# docs/reference.md: the reference's caption length, and the published resolution.
CONTEXT_LENGTH, IMAGE_SIZE = 128, 224


def convert(source: str, target: Path, **options: Any) -> list[str]:
    """Lines for the user. `options` are those of `ov2 convert` that are given. Raises UserError."""
    path = Path(source)
    if (path / SHARDED_CONTENT).is_file():
        _refuse(source, options)
        return _to_file(path, target)
    if target.suffix == ".npz":
        _refuse(source, options)
        model = caption_model(open_model(source))
        flat = to_flax(model.state_dict(), model.text_decoder.config.heads)
        write_npz(target, flat)
        return [f"{target}: {len(flat)} Flax parameters from {source}"]
    notes = []
    if path.suffix == ".npz" or (path.is_dir() and not (path / CONFIG).is_file()):
        length = options.get("context_length", CONTEXT_LENGTH)
        vocabulary = options.pop("tokenizer", None)
        model = _from_flax(read_flax(path), **options)
        tokenizer = WordPieceTokenizer(vocabulary, length) if vocabulary else None
        run = LoadedModel(model, None, tokenizer, ov2_preprocess_cfg({}), path, path)
        if tokenizer is None:
            notes.append("no --tokenizer given: the folder has no vocabulary, so the model cannot write captions")
    else:
        _refuse(source, options, but="image_size")
        run = open_model(source, image_size=options.get("image_size"))
    model = caption_model(run)
    with new_folder(target) as folder:
        export_source(run, target.resolve().name).write_whole(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return [f"{target}: {count:,} parameters, encoder and decoder, from {source}", *notes]


def _to_file(checkpoint: Path, target: Path) -> list[str]:
    """A sharded checkpoint as the file that --fsdp-checkpoint full would have written. Raises UserError."""
    if target.suffix != ".pt" or target.exists():
        raise UserError(f"--to {target}: a sharded checkpoint becomes a new file; give a name that ends in .pt")
    content = read_checkpoint(checkpoint)
    with written_whole(target) as file:
        torch.save(content, file)
    count = sum(value.numel() for value in content["state_dict"].values())
    return [f"{target}: {count:,} parameters and the state to resume from, from {checkpoint}"]


def _refuse(source: str, options: Mapping[str, Any], but: str = "") -> None:
    """Raises UserError for an option that would have no effect."""
    for name in options:
        if name != but:
            raise UserError(
                f"--{name.replace('_', '-')} applies to Flax parameters only, and {source} has a configuration of its "
                "own; leave the flag out"
            )


def _from_flax(
    flat: Mapping[str, np.ndarray],
    *,
    image_size: int = IMAGE_SIZE,
    context_length: int = CONTEXT_LENGTH,
    fusion: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> CaptionModel:
    """In evaluation mode, with the reference's word-piece ids. Raises UserError."""
    if context_length < 2 or image_size < 1:
        raise UserError(f"--context-length {context_length} --image-size {image_size}: at least 2 (bos, eos) and 1")
    cfg = flax_model_cfg(flat, heads, decoder_heads)
    cross = cfg["fusion"] == "cross_attn"
    if fusion is not None and (fusion == "cross_attn") != cross:
        raise UserError(f"--fusion {fusion}: the decoder {'has' if cross else 'has no'} cross-attention blocks")
    cfg["fusion"] = fusion or cfg["fusion"]
    cfg["vision_cfg"]["image_size"] = image_size
    cfg["text_cfg"] |= {"context_length": context_length, "bos_id": BOS_ID, "eos_id": EOS_ID, "pad_id": PAD_ID}
    state = from_flax(flat)
    try:
        model = build_caption_model(**cfg)
        expected = {name: value for name, value in model.state_dict().items() if name not in NOT_IN_FLAX}
        check_fit("the Flax parameters", state, expected)
    except ValueError as error:
        raise UserError(str(error)) from error
    model.load_state_dict(state, strict=False)  # the position table and the identity are the model's own
    return model.eval()

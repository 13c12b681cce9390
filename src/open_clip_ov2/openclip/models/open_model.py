"""Opens a model from a run, a checkpoint of it, a folder or a hub name, released or exported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory as open_clip_factory
from torch import nn

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.formats.authors import DECODER_CONFIG, DECODER_FILE, VOCAB_FILE
from open_clip_ov2.formats.open_clip import CONFIG as CONFIG  # for run_folder.py
from open_clip_ov2.openclip.models.factory import check_named_size
from open_clip_ov2.openclip.models.released import CONTEXT_LENGTH, add_decoder
from open_clip_ov2.openclip.models.shipped import shipped_folder
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer
from open_clip_ov2.quiet import quiet
from open_clip_ov2.train.checkpoint import list_checkpoints

logger = logging.getLogger(__name__)

LOCAL, HUB = "local-dir:", "hf-hub:"


@dataclass
class LoadedModel:
    """A trained model in evaluation mode with its preprocessing and tokenizer, and where it was found."""

    model: nn.Module
    preprocess: Any
    tokenizer: Any
    preprocess_cfg: dict[str, Any]
    folder: Path
    checkpoint: Path


@dataclass(frozen=True)
class Where:
    """Where a model is. `name` is its name for OpenCLIP; `pretrained` belongs to a model of OpenCLIP's registry.

    With neither `checkpoint` nor `pretrained`, the folder's own weights are meant.
    """

    name: str
    folder: Path | None
    checkpoint: Path | None
    pretrained: str | None = None


def open_model(
    source: str | Path, device: str = "cpu", *, image_size: int | None = None, position_table: str | None = None
) -> LoadedModel:
    """A trained model in evaluation mode. Raises UserError.

    `source`: a run's folder, a checkpoint in it, a folder with open_clip_config.json and weights (released or written
    by `ov2 export` or `ov2 convert`), a hub name with `hf-hub:`, or a name of OpenCLIP's registry with its weights,
    `ov2-vit-nano-8:TAG`, `ViT-B-32:openai`, `ViT-B-32:FILE`. `image_size` and `position_table` as for `create_model`.
    With a caption decoder if there is one.
    """
    where = locate(str(source))
    options: dict[str, Any] = {} if position_table is None else {"position_table": position_table}
    try:
        check_named_size(where.name, image_size)
        # OpenCLIP warns of random weights, which would be wrong where a checkpoint is read next.
        with quiet() if where.checkpoint is not None else contextlib.nullcontext():
            model, _, preprocess = open_clip.create_model_and_transforms(
                where.name,
                where.pretrained,
                load_weights=where.checkpoint is None,
                require_pretrained=where.checkpoint is None,
                force_image_size=image_size,
                **options,
            )
        if where.checkpoint is not None:
            open_clip_factory.load_checkpoint(model, str(where.checkpoint), weights_only=True)
        tokenizer = open_clip.get_tokenizer(where.name)
        if isinstance(model, VisionModel):
            model, tokenizer = _with_decoder(model, tokenizer, where)
        model.to(torch.device(device)).eval()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where.checkpoint or source}: cannot be loaded ({first_line(error)})") from error
    folder, checkpoint = where.folder, where.checkpoint
    if where.pretrained is not None:
        folder, checkpoint = Path(), Path(where.pretrained)
    elif folder is None:
        folder = Path(_hub_file(where.name, CONFIG)).parent
    return LoadedModel(model, preprocess, tokenizer, dict(model.visual.preprocess_cfg), folder, checkpoint or folder)


def create_caption_model(source: str, **options: Any) -> tuple[CaptionModel, Callable[..., Any], Any]:
    """(model, preprocess, tokenizer) of a model that captions; `source` and `options` as for `open_model`.

    For the released checkpoints this is the encoder with the caption decoder that lies beside it.
    """
    run = open_model(source, **options)
    return caption_model(run), run.preprocess, run.tokenizer


def caption_model(run: LoadedModel) -> CaptionModel:
    """The model, if it has a decoder. Raises UserError for one without."""
    if isinstance(run.model, CaptionModel):
        return run.model
    if isinstance(run.model, VisionModel):
        raise UserError(f"{run.folder}: an encoder without a decoder ({DECODER_FILE}), so it cannot caption")
    raise UserError(f"{run.folder}: not an ov2 model")


def locate(source: str) -> Where:
    """Where the model of this source is. Raises UserError."""
    if source.startswith(HUB):
        return Where(source, None, None)
    if (folder := shipped_folder(source)) is not None:
        return Where(source, folder, None)
    path = Path(source.removeprefix(LOCAL))
    name, _, pretrained = source.partition(":")
    if not path.exists() and name in open_clip.list_models():
        if not pretrained:
            raise UserError(f"{source}: a model without weights; name them, {name}:TAG or {name}:FILE")
        return Where(name, None, None, pretrained)
    if path.is_dir() and (path / CONFIG).is_file() and not (path / "checkpoints").is_dir():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise UserError(f"{path}: neither checkpoints nor weights in it")
        return Where(LOCAL + str(path), path, None)
    folder, checkpoint = find_checkpoint(path)
    return Where(LOCAL + str(folder), folder, checkpoint)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint file) of a run's folder or of a checkpoint in it. Raises UserError."""
    if path.is_file():
        for folder in (path.parent, path.parent.parent):
            if (folder / CONFIG).is_file():
                return folder, path
        raise UserError(f"{path}: no {CONFIG} beside it or one folder up, so its model is not known")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: not the folder of a run (no {CONFIG} in it)")
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: no checkpoint in {path / 'checkpoints'} yet")
    return path, found[-1]


def _hub_file(name: str, file: str) -> str:
    return open_clip_factory.download_pretrained_from_hf(name.removeprefix(HUB), filename=file)


def _with_decoder(model: VisionModel, tokenizer: Any, where: Where) -> tuple[nn.Module, Any]:
    """The released caption decoder and its word pieces, where they lie beside the encoder."""
    folder = where.folder or _fetch_decoder(where.name)
    if folder is None or not (folder / DECODER_CONFIG).is_file():
        logger.info("%s: an encoder alone (no %s)", where.name, DECODER_CONFIG)
        return model, tokenizer
    if not (folder / VOCAB_FILE).is_file():
        raise UserError(f"{folder}: a caption decoder without its vocabulary, {VOCAB_FILE}")
    captioner = add_decoder(model, folder)
    return captioner, WordPieceTokenizer(folder / VOCAB_FILE, CONTEXT_LENGTH)


def _fetch_decoder(name: str) -> Path | None:
    """The hub's snapshot with all three files of the decoder in it; none if the repository has no decoder.

    Raises UserError if that cannot be known: a network that fails does not answer the question.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        found = Path(hf_hub_download(name.removeprefix(HUB), DECODER_CONFIG))
    except LocalEntryNotFoundError as error:  # not in the cache, and the hub was not or could not be asked
        if not constants.HF_HUB_OFFLINE:
            raise UserError(f"{name}: cannot tell whether it has a caption decoder ({first_line(error)})") from error
        logger.warning("%s: offline, and no %s in the cache: an encoder alone", name, DECODER_CONFIG)
        return None
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise UserError(f"{name}: cannot tell whether it has a caption decoder ({first_line(error)})") from error
    for file in (DECODER_FILE, VOCAB_FILE):
        _hub_file(name, file)
    return found.parent
